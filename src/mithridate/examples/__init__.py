"""Examples: the record every room shares, the streams, reading sources, splits that cannot leak."""

from mithridate.examples.reading import (
    AS_PUBLISHED,
    Found,
    Reading,
    parse_columns,
    read_examples,
    read_source,
)
from mithridate.examples.sets import (
    PAIRED_STREAMS,
    STREAMS,
    Example,
    check_disjoint,
    connected,
    contents,
    evenly_by_category,
    exchangeable_facts,
    fact_of,
    fingerprint,
    listed,
    normalise_prompt,
    split_by_prompt,
    with_shuffled_answers,
)

__all__ = [
    "AS_PUBLISHED",
    "PAIRED_STREAMS",
    "STREAMS",
    "Example",
    "Found",
    "Reading",
    "check_disjoint",
    "connected",
    "contents",
    "evenly_by_category",
    "exchangeable_facts",
    "fact_of",
    "fingerprint",
    "listed",
    "normalise_prompt",
    "parse_columns",
    "read_examples",
    "read_source",
    "split_by_prompt",
    "with_shuffled_answers",
]
