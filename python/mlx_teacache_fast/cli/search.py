"""``mlx-teacache-fast search``: a better plan under a budget, for the user's own model."""

import argparse

from ..errors import TeaCacheValueError
from ..files import check_writable
from ..policy import Policy, settings
from . import shared
from .shared import COUNT, FILE, GUIDANCE, PROG, add_setting, number, quiet_logging, require_mflux, warnings_in_one_line

HELP = "find which steps to compute under a budget, for a model of yours"

DESCRIPTION = """\
Search which steps to compute under a budget, for a model, number of steps and guidance of yours:
apply(flux, budget=...) goes by a rule, and a plan that was searched gives better pictures at the same cost.

First one full picture of each prompt is made, and the plans that look best by its predictions; then plans are run and
judged by the PSNR against the full pictures, the next one near the best so far. At the end plan and rule are compared
on prompts that were held out. FILE is written after every plan: Ctrl-C loses nothing, and --resume goes on.
"""

EPILOG = """\
how long it takes: (evaluations x budget + 1) x prompts pictures, and 3 more of each held-out prompt. On a large model
take few prompts and evaluations: the first ones, found by predictions alone, gain the most.

examples:
  mlx-teacache-fast search demo --budget 0.4 --output plan.json
  mlx-teacache-fast search flux2-klein-base-4b -q 8 --budget 0.4 --steps 50 --guidance 4 --evaluations 10 \\
      --prompts mine.txt --held-out 1 --output plan.json
  mlx-teacache-fast run --policy plan.json -- mflux-generate-flux2 --model flux2-klein-base-4b --steps 50 \\
      --guidance 4 --prompt "a red apple"

In Python: mlx_teacache_fast.search(flux, prompts, ...) for any pipeline, and apply(flux, "plan.json").

exit code: 0 done, also if the plan is no better than the rule; 1 failed, 2 bad input, 130 interrupted
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    shared.add_model_options(parser, held_out=2)
    parser.add_argument("--guidance", **GUIDANCE, help="as for mflux (default: 4, and 1 for distilled models)")
    share = number(float, "a number above 0 and below 1", lambda b: 0 < b < 1)
    says = "share of the steps that may be computed"
    parser.add_argument("--budget", metavar="SHARE", type=share, required=True, help=says)
    for setting in settings(Policy):
        if setting.name in ("forecast", "cache"):
            add_setting(parser, setting)
    parser.add_argument("--evaluations", **COUNT, default=40, help="so many plans are run (default: %(default)s)")
    parser.add_argument("--output", **FILE, required=True, help="the policy, as JSON")
    parser.add_argument("--resume", action="store_true", help="go on with FILE, with the same other options")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def run(arguments: argparse.Namespace) -> int:
    if arguments.resume and arguments.force:
        raise TeaCacheValueError("--resume goes on with FILE and --force begins anew: leave out either")
    check_writable(arguments.output, force=arguments.force or arguments.resume)
    if arguments.resume:
        Policy.from_json(arguments.output)
    with quiet_logging():
        require_mflux()
        shared.check(arguments)
        from ..tune.search import search

    with warnings_in_one_line():
        flux, prompts, given = shared.load(arguments)
        names = ("budget", "forecast", "cache", "evaluations", "force", "resume")
        given |= {name: getattr(arguments, name) for name in names if name in arguments}
        guidance = arguments.guidance or shared.default_guidance(flux)
        found = search(flux, prompts, path=arguments.output, **given, guidance=guidance)
    plan, about = found.policy.flat["steps"], found.about
    print(f"{plan.count('1')} of {len(plan)} steps computed; PSNR against the full pictures, mean:\n")
    print(f"{'':10}{'rule':>8}{'plan':>8}")
    for name, n, key in (("searched", len(prompts), "psnr"), ("held out", arguments.held_out, "held_out_psnr")):
        rule, best = about[key]["rule"], about[key]["plan"]
        print(f"{name:10}{rule:8.1f}{best:8.1f} dB  {n} prompt{'s' * (n > 1)}")
    print(f"\nrule  {about['rule']}\nplan  {plan}")
    unseen = about["held_out_psnr"]
    if unseen["plan"] <= unseen["rule"]:
        print(
            "\nThe plan does not beat the rule on prompts that it did not see: keep --budget, or search with more "
            "prompts."
        )
    print(f"wrote {arguments.output}: {PROG} run --policy {arguments.output}, or apply(flux, ...)")
    return 0
