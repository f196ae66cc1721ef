"""The versions that doctor calls tested are those that the tests run with."""

from __future__ import annotations

from coterie import versions


def test_what_the_tests_run_with_is_tested_and_admitted():
    """Fails in a fresh environment, where the newest versions are installed, until TESTED names them."""
    assert versions.problems(versions.installed()) == []


def test_every_problem_names_the_command_that_mends_it():
    wrong = {"transformers": "5.2.0", "torch": "99.0", "numpy": "1.0", "peft": "not installed"}
    old, untested, other = versions.problems(wrong)
    assert "does not work" in old and old.endswith(
        f"pip install 'transformers=={versions.TESTED['transformers'][1]}.*'"
    )
    assert "untested" in untested and "pip install 'torch==" in untested
    assert other.endswith("pip install -U numpy")


def test_patch_releases_and_local_versions_are_of_their_minor_version():
    last = versions.TESTED["torch"][1]
    assert versions.is_tested("torch", f"{last}.9+cpu") and not versions.is_tested("torch", "99.0")
