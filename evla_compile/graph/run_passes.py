"""Rewrite a graph by passes, one after the other."""

from collections.abc import Iterable

from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, PassReport


def run_passes(
    gm: fx.GraphModule, passes: Iterable[GraphPass], *, earlier: Iterable[PassReport] = ()
) -> tuple[fx.GraphModule, tuple[PassReport, ...]]:
    """Return a graph rewritten by passes, and their reports; `gm` itself is never changed.

    Args:
        gm: the graph.
        passes: rewrites in their order; each is taken from the iterable when it is its turn.
        earlier: reports of the passes that `gm` is the result of; returned in front of the new ones.

    Raises:
        PassError: a pass does not find its site; the message names the pass, and those that ran before it.
    """
    reports = list(earlier)
    for rewrite in passes:
        try:
            gm, report = rewrite(gm)
        except PassError as error:
            before = ", ".join(report.name.partition("(")[0] for report in reports)
            raise PassError(f"{type(rewrite).__name__}: {error} (passes before it: {before or 'none'})") from error
        reports.append(report)
    return gm, tuple(reports)
