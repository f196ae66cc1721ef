"""The start-up hook: coterie registers with Transformers and PEFT whoever imports them, in whatever order."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
import transformers

import coterie
from coterie import tiny
from coterie.convert import convert_cpu

PACKAGE = Path(coterie.__file__).parent
SRC = PACKAGE.parent
PTH = SRC / "coterie.pth"
REGISTERED = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "coterie" in ALL_EXPERTS_FUNCTIONS and "coterie" in AUTO_QUANTIZER_MAPPING
"""
# As a script that knows nothing of coterie would: what is loaded, and whether its logits are the ones expected.
OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(3, 20)[None]).logits, sys.argv[2])
"""


def run(code: str, *arguments: object, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *options, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def done(code: str, *arguments: object, options: tuple[str, ...] = ()) -> str:
    result = run(code, *arguments, options=options) if options else forks.run(code, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def bare(*folders: Path) -> str:
    """Code that runs before: an interpreter whose packages are those of Transformers' folder, without what start-up
    files there do; `folders` are site folders, with what their .pth files do."""
    packages = Path(transformers.__file__).parents[1]
    return (
        f"import sys, site\nfor folder in {[str(folder) for folder in folders]!r}: site.addsitedir(folder)\n"
        f"sys.path.append({str(packages)!r})\n"
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    coterie.from_pretrained(tiny.PATH, experts="int8").save_pretrained(folder)
    return folder


@pytest.fixture
def installed(site) -> Path:
    """A site folder as an installed wheel has it."""
    (site / "coterie").mkdir()
    for path in (*PACKAGE.iterdir(), Path(coterie._native.__file__)):
        if path.name != "__pycache__" and not (site / "coterie" / path.name).exists():
            (site / "coterie" / path.name).symlink_to(path)
    return site


@pytest.fixture
def site(tmp_path) -> Path:
    """A site folder as an installed wheel has it, but for the package."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in ("coterie.pth", "coterie_hook.py"):
        shutil.copy(SRC / name, folder)
    return folder


# --- programs that never import coterie ---


def test_packed_folder_opens_without_importing_coterie(packed, installed, tmp_path):
    code = bare(installed) + OPEN
    output = done(code, packed, tmp_path / "logits.pt", options=("-S", "-I"))
    assert "newly initialized" not in output
    with torch.no_grad():
        expected = coterie.from_pretrained(packed)(torch.arange(3, 20)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_packed_folder_is_refused_where_coterie_is_not(packed, tmp_path):
    """Transformers alone warns of an unknown quantization type and finds no weights: it never makes them up."""
    code = bare() + "assert not any('coterie' in str(finder) for finder in sys.meta_path)\n" + OPEN
    result = run(code, packed, tmp_path / "logits.pt", options=("-S", "-I"))
    assert result.returncode == 1 and not (tmp_path / "logits.pt").exists()
    assert "no file named model.safetensors" in result.stderr
    assert "Unknown quantization type, got coterie" in result.stderr


def test_converted_folder_is_refused_where_coterie_is_not(tmp_path):
    convert_cpu(tiny.PATH, tmp_path / "converted", "int8")
    result = run(bare() + OPEN, tmp_path / "converted", tmp_path / "logits.pt", options=("-S", "-I"))
    assert result.returncode == 1 and "no file named model.safetensors" in result.stderr


def test_start_up_imports_nothing(site):
    """What Python had imported before, and the hook: no torch, no coterie, no importlib machinery."""
    code = (
        "import sys, site\nbefore = set(sys.modules)\n"
        f"site.addsitedir({str(site)!r})\n"
        "assert set(sys.modules) - before == {'coterie_hook'}, set(sys.modules) - before\n"
        "assert sys.modules['coterie_hook'].FINDER in sys.meta_path"
    )
    done(code, options=("-S", "-I"))


def test_start_up_file_is_one_line_that_site_runs():
    lines = PTH.read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("import coterie_hook")


def test_hook_without_the_package_says_so_and_harms_nothing(site):
    """A hook that was left behind."""
    code = bare(site) + "sys.modules['coterie'] = None\nimport transformers.modeling_utils, transformers.trainer"
    output = done(code, options=("-S", "-I"))
    assert "coterie does not work with this transformers" in output and "packed models cannot be loaded" in output


def test_settings_that_coterie_refuses_do_not_break_transformers(installed):
    code = bare(installed) + (
        "import os\nos.environ['COTERIE_THREADS'] = 'many'\nimport transformers.modeling_utils\nprint('went on')"
    )
    output = done(code, options=("-S", "-I"))
    assert "went on" in output and "COTERIE_THREADS" in output


def test_both_files_are_installed():
    """Beside the package, by CMake: what scikit-build-core puts in a wheel besides packages."""
    cmake = (SRC.parent / "CMakeLists.txt").read_text()
    assert "install(FILES src/coterie.pth src/coterie_hook.py DESTINATION .)" in cmake


# --- programs that import it, in either order ---


def test_import_leaves_transformers_alone():
    done("import sys, coterie; assert not any(name.partition('.')[0] == 'transformers' for name in sys.modules)")


@pytest.mark.parametrize(
    "imports",
    [
        "import coterie\nimport transformers.modeling_utils",
        "import transformers.modeling_utils\nimport coterie",
        "import coterie\nfrom transformers import PreTrainedModel",
        "import coterie\ncoterie.from_pretrained",
        "import coterie\nimport transformers.trainer",
        "import coterie_hook\ncoterie_hook.install()\nimport transformers.trainer, peft",
        "import coterie, importlib.util\nassert importlib.util.find_spec('transformers.modeling_utils')\n"
        "import transformers.modeling_utils",
    ],
)
def test_registers(imports):
    output = done(imports + REGISTERED)
    assert "does not work" not in output


def test_trainer_and_peft_are_registered_with():
    done(
        "import coterie_hook\ncoterie_hook.install()\nimport peft, transformers.trainer\n"
        "import coterie.hf.adapter_fit as fit, coterie.hf.trainer as trainer\n"
        "assert peft.peft_model.set_peft_model_state_dict is fit.set_state\n"
        "assert transformers.Trainer._load_from_checkpoint is trainer.load_from_checkpoint"
    )


def test_registers_after_a_first_import_that_failed(tmp_path):
    """A module that is executed twice because the first time failed is followed by the registration."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").touch()
    (tmp_path / "transformers" / "modeling_utils.py").write_text(
        "import builtins\n"
        "if not hasattr(builtins, 'second'):\n    builtins.second = True\n    raise ImportError('once')\n"
    )
    done(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "import coterie_hook\ncoterie_hook.install()\n"
        "registered = []\ncoterie_hook._register = registered.append\n"
        "for expected in ([], ['transformers.modeling_utils']):\n"
        "    try:\n        import transformers.modeling_utils\n    except ImportError as error:\n"
        "        assert str(error) == 'once'\n"
        "    assert registered == expected, registered"
    )


def test_upstream_source_can_still_be_inspected():
    done(
        "import coterie, inspect, transformers.modeling_utils as m\n"
        "assert 'class PreTrainedModel' in inspect.getsource(m)\n"
        "assert m.__spec__.loader.get_source('transformers.modeling_utils')"
    )


def test_warns_where_transformers_is_too_different():
    output = done("import sys, coterie\nsys.modules['coterie.hf'] = None\nimport transformers.modeling_utils")
    assert "coterie does not work with this transformers" in output


def test_unknown_name():
    output = done("import coterie\ntry:\n    coterie.nothing\nexcept AttributeError as error:\n    print(error)")
    assert "no attribute 'nothing'" in output
