"""Runs mlx-teacache 0.4.1's own unit tests against this package: which pass, which do not, and why.

Its source distribution is downloaded from the package index and unpacked into a temporary folder; peer_names.py maps
the names that its tests import. Exits with 1 if a test fails that DIFFERS does not list, or if one that DIFFERS lists
passes or is not there.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import peer_names
import pytest

PEER = "mlx-teacache==0.4.1"
SHA256 = "f5dac0b1e29360200154da95c172784b2386a82f33b56c4cd182acc92280b7d1"  # of its source distribution

CFG = "guidance is gated like any step, and the statistics do not say whether there was any"
VALUES = "an error is made from a message here, which gives the same values in other words"
NO_SUCH_ERROR = "there is no such error here, docs/mlx-teacache.md says why"
NO_PENDING = "there is no PendingFinalize here: a generation counts when generate_image returns"
INIT_TIME_STEP = "mflux's configurations always have an init_time_step, which is a number"

# The files that are run, and for each the tests that do not pass: what pytest says of it, and why. Its other files need
# weights, or call its copies of mflux's forward passes and its table of coefficients.
DIFFERS = {
    "test_gate.py": {
        "test_poly_eval_negative_x_can_be_negative": (
            "assert 2.5 == 0.5",
            "no distance is negative, and a price is at least 0",
        ),
    },
    "test_gate_hypothesis.py": {},
    "test_stats.py": {
        "test_finalize_commits_to_public_and_snapshots": ("no attribute 'cfg_was_active'", CFG),
        "test_speedup_estimate_excludes_cfg_fallback": ("assert 10 == 0", CFG),
        "test_counter_sum_invariant": ("assert 8 == 5", CFG),
        "test_freeze_blocks_further_mutation": (
            "DID NOT RAISE NotHere",
            "after restore() nothing counts, which is no error",
        ),
        "test_finalize_length_mismatch_raises_and_discards_staging": (
            "DID NOT RAISE InternalStateError",
            "it does not count here either, but only warns",
        ),
        "test_staging_cfg_was_active_defaults_false": ("no attribute 'cfg_was_active'", CFG),
        "test_staging_cfg_was_active_clears_on_clear": ("'NotHere' object has no attribute 'clear'", CFG),
        "test_finalize_records_cfg_was_active_from_staging": ("no attribute '_staging'", CFG),
    },
    "test_errors.py": {
        "test_all_subclass_teacache_error": (
            "issubclass(",
            f"CalibrationError, TransformerShapeError: {NO_SUCH_ERROR}",
        ),
        "test_incompatible_model_lists_supported_variants": ("takes no keyword arguments", VALUES),
        "test_invalid_step_window_names_values": ("takes no keyword arguments", VALUES),
        "test_invalid_step_window_message_reports_both_counts_when_provided": ("takes no keyword arguments", VALUES),
        "test_transformer_shape_error_names_step_and_shapes": ("NotHere() takes no keyword arguments", NO_SUCH_ERROR),
        "test_calibration_error_names_variant": ("NotHere() takes no keyword arguments", NO_SUCH_ERROR),
        "test_missing_generation_context_has_remediation": ("assert 'handle.restore()' in ''", VALUES),
    },
    "test_lifecycle.py": {
        "test_before_loop_captures_num_steps": ("no attribute 'token'", "asserts a private counter of generations"),
        "test_after_loop_marks_pending_finalize_does_not_commit": ("assert 25 is None", NO_PENDING),
        "test_wrap_callback_replacement_raises_missing_context": (
            "DID NOT RAISE NotHere",
            "nothing is registered with mflux's callbacks, so they may be replaced",
        ),
    },
    "test_lifecycle_img2img.py": {
        "test_active_step_count_missing_init_time_step_attribute_treats_as_txt2img": (
            "no attribute 'init_time_step'",
            INIT_TIME_STEP,
        ),
        "test_active_step_count_init_time_step_is_None": ("'int' and 'NoneType'", INIT_TIME_STEP),
        "test_after_loop_uses_active_num_steps_for_pending_finalize": (
            "assert None == namespace(num_inference_steps=8",
            NO_PENDING,
        ),
        "test_after_loop_defensive_recompute_when_gen_ctx_active_is_none": (
            "assert None == namespace(num_inference_steps=13",
            NO_PENDING,
        ),
        "test_before_loop_resets_stale_cache_for_img2img": (
            "assert 8 == 0",
            "asserts private attributes; each generation has its own",
        ),
    },
    "test_forward_flux1_img2img.py": {
        "test_img2img_first_call_uses_step_counter_zero_even_when_t_positive": (
            "no attribute '_staging'",
            "records have no timestep",
        ),
        "test_skip_window_validated_against_active_num_steps_not_nominal": (
            "DID NOT RAISE InvalidStepWindowError",
            "a schedule as short as the forced steps computes all, and warns",
        ),
    },
    "test_distilled_warning.py": {
        "test_does_not_fire_when_window_is_invalid": (
            "no-benefit warning should be suppressed",
            "here the warning is in the error's place",
        ),
    },
}


class Results:
    """A plugin for pytest: what became of each test."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: dict[str, str] = {}  # and the traceback

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.removeprefix("tests/")
        if not report.passed:
            self.failed[test] = report.longreprtext
        elif report.when == "call":
            self.passed.add(test)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed[report.nodeid.removeprefix("tests/")] = report.longreprtext


def download(folder: Path) -> Path:
    """The source distribution from the package index, by pip; where that is not installed, by uv's."""
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        pip = [os.environ.get("UV") or shutil.which("uv") or "uv", "tool", "run", "pip"]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", folder, PEER], check=True)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def run(sdist: Path, folder: Path) -> Results:
    shutil.unpack_archive(sdist, folder)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    peer_names.install()
    mx.set_default_device(mx.cpu)
    results = Results()
    options = ["--disable-plugin-autoload", "-p", "no:terminal", "-p", "no:cacheprovider"]
    with contextlib.chdir(unpacked):  # pytest's settings are there, and hypothesis writes there
        pytest.main([*options, *(f"tests/{name}" for name in DIFFERS)], plugins=[results])
    return results


def report(results: Results) -> bool:
    """Prints a table; True if all is as listed."""
    reasons = {f"{file}::{test}": seen for file, tests in DIFFERS.items() for test, (seen, _) in tests.items()}
    wrong = {
        test: f"fails, and not as listed:\n{text}"
        for test, text in results.failed.items()
        if test not in reasons or reasons[test] not in text
    }
    for test in reasons.keys() - results.failed.keys():
        wrong[test] = "is listed, and passes" if test in results.passed else "is listed, and is not there"
    differs = reasons.keys() & results.failed.keys()
    for file in DIFFERS:
        n_passed = sum(test.startswith(f"{file}::") for test in results.passed)
        print(f"{file}: passed {n_passed}, differs {sum(test.startswith(f'{file}::') for test in differs)}")
        for test, (_, why) in DIFFERS[file].items():
            print(f"    {test}: {why}")
    for test, why in wrong.items():
        print(f"WRONG: {test} {why}")
    n_failed = len(results.failed) - len(differs)
    print(f"{PEER}, {len(DIFFERS)} files: passed {len(results.passed)}, differs {len(differs)}, failed {n_failed}")
    return not wrong and bool(results.passed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, metavar="FILE", help="its source distribution, in place of a download")
    sdist: Path | None = parser.parse_args().sdist
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            sdist = download(folder) if sdist is None else sdist.resolve(strict=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"no source distribution of {PEER}: {error}")
        if (found := hashlib.sha256(sdist.read_bytes()).hexdigest()) != SHA256:
            sys.exit(f"{sdist.name} is not the source distribution of {PEER}: its SHA-256 is {found}, not {SHA256}")
        sys.exit(not report(run(sdist, folder)))


if __name__ == "__main__":
    main()
