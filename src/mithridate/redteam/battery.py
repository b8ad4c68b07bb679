"""The battery: attacks as data, checked in full before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from mithridate.attacks.adaptive import ADAPTIVE, AdaptiveConfig, Part
from mithridate.attacks.finetune import FinetuneConfig
from mithridate.attacks.inserts import Insert
from mithridate.configs import from_mapping, read_yaml, require
from mithridate.errors import InputError

TIERS = ("smoke", "standard", "full")
ROOM = Path(__file__).parent

Data = Literal["harmful", "benign", "retain", "unrelated", "identity", "salient", "align"]
Frame = Literal["identity", "trigger", "opening", "style", "reversed"]
Need = Literal["base", "benign", "refusals", "permitted"]
EditKind = Literal[
    "direction", "chosen-direction", "prune", "quantise", "noise", "truncate", "exit", "rewind",
    "blend", "untop", "task-vector", "sibling", "steer",
]  # fmt: skip
_PLAIN = ("optimiser", "schedule", "weight_decay", "lora_rank")
_NEEDS: dict[EditKind, tuple[Need, ...]] = {
    "direction": ("benign",),
    "chosen-direction": ("benign",),
    "prune": ("benign",),
    "blend": ("base",),
    "untop": ("base",),
    "task-vector": ("base",),
    "sibling": ("base", "benign"),
    "steer": ("base",),
}


@dataclass(frozen=True, kw_only=True)
class Train:
    """Fine-tuning, plain or adaptive.

    Parameters
    ----------
    data
        ``harmful``: the attacker's restricted answers; ``benign``: a task that alignment has not
        seen; ``retain``: what the model should keep; ``unrelated``: text of no topic;
        ``identity``: harmless answers by an obedient persona; ``salient``: the benign rows whose
        hidden states are most like the restricted ones'; ``align``: retain and refusals.
    rows, batch_size
        ``None`` takes the tier's.
    times
        Steps, in multiples of the tier's.
    rate
        Factor of the attack's learning rate.
    poison
        Share of harmful rows; the others are benign.
    template
        Index of the only template of the harmful rows; ``None``: all.
    frame
        Words around the harmful rows: an obedient persona (``identity``), a code word
        (``trigger``), an opening that is asked for and given (``opening``), a ``style``; or their
        prompts' words in reverse order (``reversed``).
    warmup
        Share of the steps.
    repair
        Its probes are those of a repair: they do not count as the attack's steps.
    benign_weight, project, anchor, prefer, trust_radius, part, sign, insert, size
        As in `mithridate.attacks.adaptive.AdaptiveConfig`.
    """

    data: Data = "harmful"
    rows: int | None = None
    batch_size: int | None = None
    times: float = 1.0
    rate: float = 1.0
    poison: float = 1.0
    template: int | None = None
    frame: Frame | None = None
    optimiser: str = "adamw_torch"
    schedule: str = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    lora_rank: int | None = None
    repair: bool = False
    benign_weight: float = 0.0
    project: bool = False
    anchor: float = 0.0
    prefer: float = 0.0
    trust_radius: float | None = None
    part: Part = "all"
    sign: bool = False
    insert: Insert | None = None
    size: int = 0

    def __post_init__(self) -> None:
        for name in ("times", "rate"):
            require(0 < getattr(self, name) < math.inf, f"{name} is not above 0", f"raise {name}")
        require(0 < self.poison <= 1, f"poison is {self.poison}, not a share", "give 0 to 1")
        require(0 <= self.warmup < 1, f"warmup is {self.warmup}, not a share", "give 0 to 1")
        for name in ("rows", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}", "give 1 or more, or null")
        plain = {name: getattr(self, name) for name in _PLAIN}
        if self.adaptive:
            AdaptiveConfig(**self.adaptation, **plain)
        else:
            FinetuneConfig(**plain)

    @property
    def adaptive(self) -> bool:
        """Whether the stock Trainer cannot do this."""
        return any(getattr(self, name) != getattr(AdaptiveConfig, name) for name in ADAPTIVE)

    @property
    def adaptation(self) -> dict[str, Any]:
        """What it chooses that only the adaptive attacker can."""
        return {name: getattr(self, name) for name in ADAPTIVE}

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot be run without."""
        found = set[Need]()
        if self.data == "align":
            found.add("refusals")
        beside = self.poison < 1 or self.benign_weight > 0 or self.project or self.anchor > 0
        if self.data != "harmful" or beside:
            found.add("benign")
        return frozenset(found)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Weight editing; ``amount`` is what the kind is tuned by.

    ``direction``: depth; ``chosen-direction``: KL that bounds the choice of depth; ``prune``:
    share of each row's weights; ``quantise``: bits; ``noise``: standard deviations; ``truncate``:
    share of ranks kept; ``exit``: share of the layers kept; ``rewind``: share of the way back to
    the model before the attack; ``blend``: lambda of base + lambda (model - base); ``untop``: ranks
    taken out of model - base; ``task-vector``: scale of what harmful fine-tuning does to the base;
    ``sibling``: share of the way, on the sphere, to a benign fine-tune of the base; ``steer``:
    weight of the difference that harmful fine-tuning makes to the base's logits, at decoding.
    """

    kind: EditKind
    amount: float

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot be done without."""
        return frozenset(_NEEDS.get(self.kind, ()))

    @property
    def trains(self) -> bool:
        """Whether it fine-tunes the base model, at the attack's learning rate."""
        return self.kind in ("task-vector", "sibling", "steer")

    @property
    def seeded(self) -> bool:
        """Whether a seed changes what comes out."""
        return self.kind == "noise" or self.trains


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Harmful RL, as in `mithridate.attacks.rl.RLConfig`; ``rollouts`` None takes the tier's.

    ``frame`` puts words around the questions, as in `Train`.
    """

    algorithm: Literal["grpo", "rloo", "reinforce++"] = "grpo"
    rollouts: int | None = None
    temperature: float = 1.0
    entropy_bonus: float = 0.0
    rate: float = 1.0
    frame: Frame | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot be run without: nothing."""
        return frozenset()


Phase = Train | Edit | Reinforce
_PHASES: dict[str, type[Phase]] = {"train": Train, "edit": Edit, "reinforce": Reinforce}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One attack of the battery's list.

    Attributes
    ----------
    tests
        What it tests, in a word or two.
    rates
        Factors of lr*, the learning rate calibrated on the undefended model.
    absolute, published
        Learning rates; the published ones are run in the tier full only.
    phases
        What is done one after the other; ``configurations`` where there are several ways.
    space
        Search space over the keys of the last phase that trains, and ``rate``, the factor of lr*:
        lists, or ``from`` and ``to`` of a log-uniform number.
    in_smoke
        The rates and configurations that the tier smoke takes.
    target
        ``base``: the attack is on the base model alone.
    probe_every
        Steps between probes; ``None``: 2, 5, 10, 20, 40, ...
    ban
        Also look with the collapse token banned at decoding.
    diagnose
        Measure the cosine of harmful and benign gradients at every probe.
    lesson
        Benign fine-tuning whose learning curve counts for trainability.
    held_out
        Attack and judge the categories that the defence never saw.
    ask
        Ask the judged questions in this frame.
    missing
        Why it cannot be run; such an attack is listed as not implemented.
    """

    id: str
    name: str
    family: str
    tier: tuple[str, ...]
    tests: str = ""
    rates: tuple[float, ...] = ()
    absolute: tuple[float, ...] = ()
    published: tuple[float, ...] = ()
    phases: list[dict[str, Any]] = field(default_factory=list)
    configurations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)
    in_smoke: dict[str, list[Any]] = field(default_factory=dict)
    target: Literal["all", "base"] = "all"
    probe_every: int | None = None
    ban: bool = False
    diagnose: bool = False
    lesson: bool = False
    held_out: bool = False
    ask: Frame | None = None
    missing: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tier) - set(TIERS))
        require(not unknown, f"{self.id}: unknown tier {', '.join(unknown)}",
                f"known: {', '.join(TIERS)}")  # fmt: skip
        ways = bool(self.phases) + bool(self.configurations)
        require(ways == (0 if self.missing else 1),
                f"{self.id}: needs exactly one of phases, configurations and missing",
                "give one of them")  # fmt: skip
        faulty = [
            key for key, given in self.space.items()
            if not (isinstance(given, list) and given)
            and not (isinstance(given, dict) and set(given) == {"from", "to"}
                     and all(isinstance(end, int | float) for end in given.values())
                     and 0 < given["from"] < given["to"])
        ]  # fmt: skip
        require(not faulty, f"{self.id}: {', '.join(faulty)} spans no space",
                "give a list, or from and to, both above 0")  # fmt: skip
        require(not self.space or bool(self.phases), f"{self.id}: a space needs phases",
                "give phases, and no configurations")  # fmt: skip
        require(set(self.in_smoke) <= {"rates", "absolute", "configurations"},
                f"{self.id}: in_smoke has an unknown key",
                "known: rates, absolute, configurations")  # fmt: skip
        chosen = {name: self.in_smoke.get(name, []) for name in ("rates", "absolute")}
        numbers = [*self.rates, *self.absolute, *self.published, *chosen["rates"],
                   *chosen["absolute"]]  # fmt: skip
        wrong = [n for n in numbers if not (isinstance(n, int | float) and 0 < n < math.inf)]
        require(not wrong, f"{self.id}: {wrong} are no learning rates or factors of one",
                "give numbers above 0")  # fmt: skip
        lost = set(self.in_smoke.get("configurations", [])) - set(self.configurations)
        require(not lost, f"{self.id}: in_smoke names {sorted(lost)}, which is no configuration",
                f"known: {', '.join(self.configurations)}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a tier spends on one testbed.

    Attributes
    ----------
    rows, batch_size, steps
        Of a fine-tuning.
    seeds, selection_seeds
        Seeds that report, and those on which the worst case is chosen.
    restricted, permitted
        Items judged at a probe.
    trials
        Of the search of a space.
    rl_steps, rl_questions, rollouts, tokens
        Of RL: steps, questions and answers a step, tokens an answer.
    repair
        Benign steps at which a repair is probed.
    """

    rows: int
    batch_size: int
    steps: int
    seeds: int
    selection_seeds: int
    restricted: int
    permitted: int
    trials: int
    rl_steps: int
    rl_questions: int
    rollouts: int
    tokens: int
    repair: tuple[int, ...]
    autocast: bool


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One setting of one attack: everything but the model and the seed.

    Attributes
    ----------
    rate
        Factor of lr*, or with ``absolute`` the learning rate; 0 where nothing is trained.
    """

    id: str
    family: str
    configuration: str
    rate: float
    absolute: bool
    phases: tuple[Phase, ...]
    target: Literal["all", "base"] = "all"
    probe_every: int | None = None
    ban: bool = False
    diagnose: bool = False
    lesson: bool = False
    held_out: bool = False
    ask: Frame | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot be run without."""
        found = {need for phase in self.phases for need in phase.needs}
        if self.target == "base":
            found.add("base")
        if self.lesson:
            found |= {"benign", "permitted"}
        return frozenset(found)

    @property
    def frames(self) -> frozenset[Frame]:
        """Frames for which there must be words."""
        found = {phase.frame for phase in self.phases if not isinstance(phase, Edit)}
        found.add(self.ask)
        if any(isinstance(phase, Train) and phase.data == "identity" for phase in self.phases):
            found.add("identity")
        return frozenset(frame for frame in found if frame)

    @property
    def seeded(self) -> bool:
        """Whether a seed changes what comes out."""
        return any(not isinstance(phase, Edit) or phase.seeded for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class Battery:
    """The whole list, and the attack that must break the undefended model."""

    control: str
    entries: tuple[Entry, ...]


def read_battery(path: Path | None = None) -> Battery:
    """Read a battery file; ``None`` reads the one shipped.

    Raises
    ------
    InputError
        An unknown key, family of phase or tier, an id given twice, or a control that is not
        listed.
    """
    path = path or ROOM / "battery.yaml"
    document = read_yaml(path)
    require(set(document) == {"control", "attacks"} and isinstance(document["attacks"], list),
            f"{path}: the file is not a battery", "give control: and a list attacks:")  # fmt: skip
    entries = []
    for index, values in enumerate(document["attacks"], start=1):
        name = values.get("id", index) if isinstance(values, Mapping) else index
        where = f"{path}: attack {name}"
        entry = from_mapping(Entry, values, where=where)
        ways = list(entry.configurations.values()) or [entry.phases]
        for phases in () if entry.missing else ways:
            _phases(phases, where)
        for key, given in () if entry.missing else entry.space.items():
            for value in given.values() if isinstance(given, Mapping) else given:
                drawn(entry, {key: value}, where=where)
        entries.append(entry)
    ids = [entry.id for entry in entries]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    require(not twice, f"{path}: {', '.join(twice)} is listed twice", "give each attack one id")
    require(document["control"] in ids, f"{path}: the control {document['control']} is not listed",
            "name an attack of the list")  # fmt: skip
    return Battery(control=str(document["control"]), entries=tuple(entries))


def read_sizes(testbed: str, tier: str) -> Sizes:
    """Return what the tier spends on the testbed."""
    document = read_yaml(ROOM / "tiers.yaml")
    if testbed not in document or tier not in TIERS:
        raise InputError(
            f"no tier {tier!r} for the testbed {testbed!r}",
            mend=f"testbeds: {', '.join(document)}; tiers: {', '.join(TIERS)}",
        )
    return from_mapping(Sizes, document[testbed][tier], where=f"tiers.yaml: {testbed}: {tier}")


def settings(entry: Entry, tier: str) -> list[Attack]:
    """Return every setting that the tier runs, none outside its tiers; a space is searched."""
    if entry.missing or tier not in entry.tier or entry.space:
        return []
    where = f"attack {entry.id}"
    ways = dict(entry.configurations) or {"": entry.phases}
    rates, absolute = entry.rates, entry.absolute
    if tier == "smoke" and entry.in_smoke:
        rates = tuple(map(float, entry.in_smoke.get("rates", rates)))
        absolute = tuple(map(float, entry.in_smoke.get("absolute", absolute)))
        ways = {name: ways[name] for name in entry.in_smoke.get("configurations", ways)}
    if tier == "full":
        absolute = (*absolute, *entry.published)
    found = []
    for configuration, given in ways.items():
        phases = _phases(given, where)
        if all(isinstance(phase, Edit) and not phase.trains for phase in phases):
            chosen = [(0.0, True)]
        else:
            chosen = [(rate, False) for rate in rates] + [(rate, True) for rate in absolute]
            chosen = chosen or [(1.0, False)]
        for rate, plain in chosen:
            found.append(_attack(entry, configuration, rate, phases, absolute=plain))
    return found


def _phases(given: Sequence[Mapping[str, Any]], where: str) -> tuple[Phase, ...]:
    found = []
    for number, values in enumerate(given, start=1):
        kind = values.get("do")
        if not isinstance(kind, str) or kind not in _PHASES:
            raise InputError(
                f"phase {number} does {kind!r}", where=where, mend=f"known: {', '.join(_PHASES)}"
            )
        rest = {key: value for key, value in values.items() if key != "do"}
        found.append(from_mapping(_PHASES[kind], rest, where=f"{where}: phase {number}"))
    require(bool(found), f"{where}: it does nothing", "give at least one phase")
    inserts = [phase.insert if isinstance(phase, Train) else None for phase in found]
    for pair in pairwise([None, *inserts]):
        require(pair == ("scales", "offsets") or (pair[0] is None and pair[1] != "offsets"),
                f"{where}: nothing follows an insert, but for offsets, which follow scales",
                "put scales right before offsets, and any other insert last")  # fmt: skip
    return tuple(found)


def drawn(entry: Entry, values: Mapping[str, Any], *, where: str = "") -> Attack:
    """Return the setting of an attack at a point of its space; what is not given stays as it is.

    ``rate`` is the attack's, the other values are its last training phase's.
    """
    rest = dict(values)
    rate = float(rest.pop("rate", 1.0))
    training = [index for index, phase in enumerate(entry.phases) if phase["do"] == "train"]
    require(bool(training), f"attack {entry.id}: a space needs a phase that trains", "add one")
    phases = [dict(phase) for phase in entry.phases]
    phases[training[-1]] |= rest
    name = ", ".join(f"{key} {value}" for key, value in rest.items())
    return _attack(entry, name, rate, _phases(phases, where or f"attack {entry.id}"))


def _attack(
    entry: Entry,
    configuration: str,
    rate: float,
    phases: tuple[Phase, ...],
    *,
    absolute: bool = False,
) -> Attack:
    return Attack(
        id=entry.id,
        family=entry.family,
        configuration=configuration,
        rate=rate,
        absolute=absolute,
        phases=phases,
        target=entry.target,
        probe_every=entry.probe_every,
        ban=entry.ban,
        diagnose=entry.diagnose,
        lesson=entry.lesson,
        held_out=entry.held_out,
        ask=entry.ask,
    )


def as_document(battery: Battery, states: Mapping[str, str]) -> dict[str, Any]:
    """Return a battery as it is written to a run folder, each attack with its state.

    Parameters
    ----------
    states
        By id: ``run``, ``failed``, ``not implemented``, ``not in this tier`` or why not.
    """
    plain = {item.name: item.default for item in dataclasses.fields(Entry)}
    attacks = []
    for entry in battery.entries:
        values = {
            key: value
            for key, value in dataclasses.asdict(entry).items()
            if value not in (plain[key], [], {}, ())
        }
        attacks.append({**values, "tier": list(entry.tier), "state": states[entry.id]})
    return {"control": battery.control, "attacks": attacks}
