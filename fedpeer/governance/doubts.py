"""What a policy names that is not there: a rule with a slip of the pen restricts nothing, and nobody would notice.

A name need not exist to be right (a partner may be added tomorrow), so this refuses nothing: it is told to who sets the
policy, and with the policy to who looks at it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase

from fedpeer.governance.policy import Policy


def doubts(
    policy: Policy, *, partners: Collection[str], datasets: Collection[str], modules: Collection[str]
) -> list[str]:
    """A sentence for each pattern that matches nothing.

    `partners`: names and ids of the roster, `datasets`: names, `modules`: of stages, such as "horizontal.logistic".
    """
    own = {name.partition(":")[0] for name in policy.modules}
    stages, found = {*modules, *own}, list[str]()
    found += _unmatched("stages", [_module(pattern) for pattern in policy.stages], stages, "no stage")
    found += _unmatched("trusted", policy.trusted, partners, "nobody in the roster")
    for name, patterns in policy.organizations.items():
        found += _unmatched(f"organizations, {name!r}", patterns, partners, "nobody in the roster")
    for number, rule in enumerate(policy.rule, start=1):
        where = f"rule {number}"
        found += _unmatched(f"{where}, stages", map(_module, rule.stages or ()), stages, "no stage")
        found += _unmatched(f"{where}, partners", rule.partners or (), partners, "nobody in the roster")
        found += _unmatched(f"{where}, datasets", rule.datasets or (), datasets, "no dataset here")
    return found


def _module(pattern: str) -> str:
    return pattern.partition(":")[0]


def _unmatched(where: str, patterns: Iterable[str], names: Collection[str], what: str) -> Iterator[str]:
    for pattern in patterns:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, list(names), n=1)
            yield f"{where}: {pattern!r} matches {what}" + (f"; did you mean {near[0]!r}?" if near else "")
