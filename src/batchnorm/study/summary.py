"""The opening of the report: what was learned, in three sentences, and where it disagrees with the literature."""

import math

from batchnorm.study.claims import Claim, Finding

__all__ = ["disagrees", "in_margins", "sentences"]


def disagrees(finding: Finding) -> bool:
    """Whether a decided finding disagrees with the literature: one supports the claim, the other does not."""
    published = finding.claim.literature
    if published is None or finding.verdict == "undecided":
        return False
    return (published == "supported") != (finding.verdict == "supported")


def in_margins(claim: Claim, value: float | None) -> float:
    """An effect, or an end of its interval, in units of the claim's margin, which makes effects comparable.

    0 is no effect, 1 the smallest relevant effect, as claimed, and -1 the smallest relevant effect to the contrary.
    """
    if value is None:
        return 0.0
    if claim.unit == "ratio":
        return math.log(value) / math.log(claim.margin)
    return value / claim.margin


def sentences(findings: list[Finding]) -> tuple[str, str, str]:
    """How many claims hold, which holds most clearly, and where the literature disagrees."""
    return _counted(findings), _clearest(findings), _against(findings)


def _counted(findings: list[Finding]) -> str:
    def having(*verdicts: str) -> int:
        return sum(finding.verdict in verdicts for finding in findings)

    number = len(findings)
    of = f"Of {number} claims" if number != 1 else "Of one claim"
    hold, fail, open_ = having("supported"), having("not supported", "contradicted"), having("undecided")
    return f"{of} {hold} hold{'s' * (hold == 1)} here, {fail} {'does' if fail == 1 else 'do'} not, and {open_} " + (
        "is left undecided." if open_ == 1 else "are left undecided."
    )


def _clearest(findings: list[Finding]) -> str:
    """The supported claim whose interval is furthest beyond its margin."""
    supported = [f for f in findings if f.verdict == "supported" and f.interval and f.claim.rule == "effect"]
    if not supported:
        return "No effect is clear enough to be named."
    best = max(supported, key=lambda finding: in_margins(finding.claim, (finding.interval or (0.0,))[0]))
    return f"The clearest effect: {_lowered(best.claim.statement)}"


def _against(findings: list[Finding]) -> str:
    against = [finding for finding in findings if disagrees(finding)]
    if not against:
        return "No finding disagrees with the literature."
    number = "one finding" if len(against) == 1 else f"{len(against)} findings"
    said = "; ".join(f"“{finding.claim.statement.removesuffix('.')}” is {finding.verdict}" for finding in against)
    return f"The literature disagrees with {number}: {said}."


def _lowered(statement: str) -> str:
    """A sentence in the middle of another."""
    return statement[0].lower() + statement[1:]
