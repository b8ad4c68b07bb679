"""Every method, in forms that split batches differently, and the step that each takes."""

from mithridate.chat import IGNORE
from mithridate.methods import METHODS
from mithridate.methods.booster import Booster, BoosterConfig
from mithridate.methods.ctrap import CTRAP, CTRAPConfig
from mithridate.methods.repnoise import RepNoise, RepNoiseConfig
from mithridate.methods.sdd import SDD, SDDConfig
from mithridate.methods.seam import SEAM, SEAMConfig
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.methods.tar import TAR, TARConfig
from mithridate.methods.tokenbuncher import TokenBuncher, TokenBuncherConfig
from mithridate.methods.trajectory import Trajectory, TrajectoryConfig
from mithridate.methods.tvaccine import TVaccine, TVaccineConfig
from mithridate.methods.vaccine import Vaccine, VaccineConfig
from tests.tiny import tiny_context, tiny_model


def composed():
    kind = METHODS.load("seam+repnoise")
    return kind(kind.config_class(weights={"repnoise": 0.5}))


def repnoise(**options):
    return RepNoise(RepNoiseConfig(**{"batch_size": 8, "noise_weight": 1.0} | options))


EVERY = {
    "sft": lambda: SFT(SFTConfig()),
    "sdd": lambda: SDD(SDDConfig(batch_size=4, pairs=20, encoder="tfidf")),
    "ctrap": lambda: CTRAP(CTRAPConfig(lookahead_radius={"low": 0.1, "high": 0.5})),
    "ctrap exact": lambda: CTRAP(CTRAPConfig(lookahead_radius=0.3, gradient="exact")),
    "ctrap unrolled": lambda: CTRAP(CTRAPConfig(lookahead_direction="unrolled")),
    "seam": lambda: SEAM(SEAMConfig(coupling_weight=0.5, unlearning_layers=1)),
    "seam log exact": lambda: SEAM(SEAMConfig(unlearning="log", hvp="exact")),
    "seam of one row": lambda: SEAM(SEAMConfig(batch_size=1, hvp="exact")),
    "seam difference": lambda: SEAM(SEAMConfig(answer_mask="difference", hvp="exact")),
    "seam trajectory": lambda: SEAM(SEAMConfig(coupling_at="trajectory", hvp="exact")),
    "seam without coupling": lambda: SEAM(SEAMConfig(coupling_weight=0.0)),
    "vaccine": lambda: Vaccine(VaccineConfig()),
    "tvaccine": lambda: TVaccine(TVaccineConfig(layers=2)),
    "booster": lambda: Booster(BoosterConfig(lookahead_radius=0.3)),
    "booster exact": lambda: Booster(BoosterConfig(lookahead_radius=0.3, gradient="exact")),
    "repnoise": repnoise,
    "repnoise released points": lambda: repnoise(noise_loss="released", unlearning_weight=0.0),
    "repnoise few points": lambda: repnoise(mmd_points=5),
    "repnoise of one row": lambda: repnoise(batch_size=1),
    "repnoise difference": lambda: repnoise(answer_mask="difference"),
    "trajectory": lambda: Trajectory(
        TrajectoryConfig(attackers=("sgd", "lora"), retain_kl=0.5, attack_steps=(2, 2))
    ),
    "tokenbuncher": lambda: TokenBuncher(
        TokenBuncherConfig(
            batch_size=4, rollouts=2, response_length=4, benign_rows=3, min_refusal=0
        )
    ),
    "tar": lambda: TAR(TARConfig(inner_steps=4, evaluate_every=2)),
    "seam+repnoise": composed,
}


# Those that can be given rows whose labels the difference mask has taken.
MASKED = ("seam", "seam log exact", "seam without coupling", "repnoise", "repnoise few points")


def step(name, *, layers=3, unlabelled=0, **options):
    """Return a step's gradient (``None`` where a weight got none), its terms and its context.

    The first ``unlabelled`` rows of harmful and refusal batches have lost their labels.
    """
    method, context = EVERY[name](), tiny_context(tiny_model("full", layers=layers), **options)
    draw = context.draw

    def drawn(stream, rows):
        batch = draw(stream, rows)
        if stream != "benign":
            batch.labels[:unlabelled] = IGNORE
        return batch

    context.draw = drawn
    method.prepare(context)
    terms = method.step(context)
    found = [None if w.grad is None else w.grad.clone() for w in context.space.tensors]
    return found, terms, context
