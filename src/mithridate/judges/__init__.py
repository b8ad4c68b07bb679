"""What an answer is: exact, a refusal, or one of four other outcomes; and who says so."""

from mithridate.registry import Registry

JUDGES = Registry(
    "judge",
    "mithridate.judges",
    {
        "exact": "mithridate.judges.answers:ExactJudge",
        "refusal": "mithridate.judges.refusing:RefusalJudge",
        "classifier": "mithridate.judges.classifier:ClassifierJudge",
        "served": "mithridate.judges.served:ServedJudge",
    },
)

__all__ = ["JUDGES"]
