"""Each check of the doctor, with its input faked."""

import pathlib

from common.upstream import Patch

import pytest
from programs import run_program
from test_readme import load_script

doctor = load_script("doctor")
GIB = 1 << 30
HERE = pathlib.Path("here")


@pytest.mark.parametrize(("version", "trouble"), [((3, 10), True), ((3, 11), False), ((3, 13), False), ((3, 14), True)])
def test_python(version, trouble):
    assert doctor.check_python(version).trouble is trouble


@pytest.mark.parametrize(
    ("installed", "found", "trouble"),
    [
        ({"keras": "3.15.1"}, "3.15.1", False),
        ({}, "not installed", True),
        ({"keras": "2.15.0"}, "2.15.0; tested with <3.16,>=3.15.1", True),
    ],
)
def test_packages(installed, found, trouble):
    (finding,) = doctor.check_packages(["keras>=3.15.1,<3.16"], installed)
    assert (finding.subject, finding.message, finding.trouble) == ("keras", found, trouble)
    assert ("pip install" in finding.remedy) is trouble


def test_a_known_bad_release():
    (finding,) = doctor.check_packages([], {"keras": "3.15.0"})
    assert finding.trouble
    assert "security" in finding.message
    assert finding.remedy.endswith("pip install -U keras")


@pytest.mark.parametrize(
    ("driver", "seen", "found", "trouble"),
    [(False, [], "none", False), (True, ["A100"], "A100", False), (True, [], "TensorFlow sees none", True)],
)
def test_gpu(driver, seen, found, trouble):
    finding = doctor.check_gpu(driver, seen)
    assert found in finding.message
    assert ("requirements-gpu.txt" in finding.remedy, finding.trouble) == (trouble, trouble)


def test_bfloat16_is_named_where_it_pays():
    fast = doctor.check_precision(400e9, 800e9)
    assert "2.0 times as fast" in fast.message
    assert fast.remedy.endswith("--precision mixed_bfloat16")
    slow = doctor.check_precision(400e9, 40e9)
    assert (slow.message.split(";")[0], slow.remedy) == ("float32", "")
    assert (fast.trouble, slow.trouble) == (False, False)


@pytest.mark.parametrize(
    ("environment", "trouble"), [({}, False), ({"OMP_NUM_THREADS": "1"}, True), ({"OMP_NUM_THREADS": "4"}, False)]
)
def test_threads(environment, trouble):
    finding = doctor.check_threads(4, environment)
    assert (finding.trouble, finding.remedy) == (trouble, "unset OMP_NUM_THREADS" if trouble else "")


@pytest.mark.parametrize(("versions", "trouble"), [(">=3.15.1", False), ("==3.14.*", True)])
def test_patches(versions, trouble):
    finding = doctor.check_patch(("logs", Patch("keras", versions, "fit fails", lambda: None)))
    assert (finding.subject, finding.trouble) == ("patch 'logs'", trouble)
    assert finding.message.startswith("keras 3.")
    assert finding.remedy.endswith("-m pip install 'keras==3.14.*'" if trouble else "")


def test_memory_and_disk():
    assert not doctor.check_memory(8 * GIB).trouble
    assert doctor.check_memory(2 * GIB).trouble
    assert not doctor.check_disk(HERE, 50 * GIB, True).trouble
    assert "0.5 GiB free" in doctor.check_disk(HERE, GIB // 2, True).message
    assert "not writable" in doctor.check_disk(HERE, 50 * GIB, False).message


@pytest.mark.parametrize(
    ("prepared", "network", "found"),
    [(HERE, False, "prepared in here"), (None, True, "downloads it"), (None, False, "trains on its sample")],
)
def test_missing_data_is_a_note(prepared, network, found):
    finding = doctor.check_data("MNIST", HERE, prepared, network)
    assert found in finding.message
    assert not finding.trouble
    assert bool(finding.remedy) == ("sample" in found)


@pytest.mark.long
def test_the_program_ends_as_it_found(tmp_path):
    environment = {"HTTPS_PROXY": "http://127.0.0.1:9", "TFDS_DATA_DIR": str(tmp_path), "KERAS_BACKEND": "jax"}
    run = run_program("scripts/doctor.py", **environment)
    assert run.returncode == (2 if "TROUBLE" in run.stdout else 0)
    subjects = [line[8:].split(":")[0] for line in run.stdout.splitlines() if not line.startswith("  ")]
    assert {
        "Python",
        "tensorflow",
        "GPU",
        "precision",
        "patch 'symbolic build'",
        "threads",
        "memory",
        "disk",
        "MNIST",
    } <= set(subjects)
    assert run.stdout.count("trains on its sample") == 3


def test_an_unknown_flag_is_one_line():
    run = run_program("scripts/doctor.py", "--quick")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "unrecognized arguments: --quick" in run.stderr


def test_trouble_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "installed_versions", dict)
    monkeypatch.setattr("sys.argv", ["doctor.py"])
    with pytest.raises(SystemExit) as left:
        doctor.main()
    assert left.value.code == 2
    assert "TROUBLE tensorflow: not installed" in capsys.readouterr().out
