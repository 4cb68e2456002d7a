"""Runs survive kills, resume, spread over processes and a Ray cluster, and give the same numbers each way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

VALUES = ("value", "spread", "samples", "verdict", "parts", "note")


def result(folder, scale="smoke"):
    return json.loads((folder / "runs" / "toy-paper" / scale / "result.json").read_text())


def numbers(found):
    return {claim["id"]: {key: claim.get(key) for key in VALUES} for claim in found["claims"]}


def test_a_run_records_every_claim_with_verdict_machine_and_versions(lathe):
    lathe("run", "toy-paper", "--jobs", "1")
    found = result(lathe.folder)
    verdicts = {claim["id"]: claim["verdict"] for claim in found["claims"]}
    trained = "not at this scale"
    assert verdicts == {"C1": "holds", "C2": trained, "C3": trained, "C4": trained, "C5": "holds"}
    assert found["complete"] and found["machine"]["processor"] and found["versions"]["torch"]
    second = found["claims"][1]
    assert [claim["note"] for claim in found["claims"][1:3]] == ["drawn from thin air"] * 2  # trained once, told twice
    assert second["seeds"] == 2 and len(second["samples"]) == 2 and second["figure"]["data"]["values"]
    assert second["parts"] == [{"name": "largest", "value": max(second["samples"]), "holds": "≥ 0", "held": True}]


def test_a_claim_that_falls_short_exits_1_and_says_so(lathe):
    done = lathe("run", "toy-paper", "--scale", "full", "--json", code=1)
    (paper,) = json.loads(done.stdout)
    assert [c["scales"]["full"]["verdict"] for c in paper["claims"]] == [
        "holds", "holds", "falls short", "not at this scale", "holds",
    ]  # fmt: skip


def test_seeds_in_processes_of_their_own_give_the_same_numbers(lathe):
    lathe("run", "toy-paper", "--jobs", "1", "--seeds", "3")
    alone = numbers(result(lathe.folder))
    lathe("run", "toy-paper", "--jobs", "2", "--seeds", "3")
    assert numbers(result(lathe.folder)) == alone


def test_a_broken_measurement_exits_3_in_one_line_and_keeps_the_others(lathe):
    done = lathe("run", "toy-paper", code=3, TOY_BREAKS="1")
    assert "lathe: toy-paper C5: RuntimeError: told to (toy_paper.py:" in done.stderr
    found = result(lathe.folder)
    assert len(found["claims"]) == 5 and not found["complete"]
    assert "Traceback" in (lathe.folder / "runs/toy-paper/smoke/errors.txt").read_text()
    lathe("run", "toy-paper")  # measures only what broke
    again = result(lathe.folder)
    assert again["complete"] and again["claims"][1] == found["claims"][1]


def start_desk_run(lathe):
    """A run that has finished its first claim and is at work on the second, in a process group of its own."""
    command = [sys.executable, "-m", "lathe.cli", "run", "toy-paper", "--scale", "desk", "--jobs", "1"]
    running = subprocess.Popen(
        command,
        cwd=lathe.folder,
        env=lathe.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background, SIGINT may be ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path = lathe.folder / "runs/toy-paper/desk/result.json"
    give_up = time.monotonic() + 120
    while not (path.exists() and json.loads(path.read_text())["claims"]) and time.monotonic() < give_up:
        time.sleep(0.05)
    return running


def test_a_killed_run_loses_no_finished_claim_and_resumes(lathe):
    running = start_desk_run(lathe)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    before = result(lathe.folder, "desk")
    assert [claim["id"] for claim in before["claims"]] == ["C1"] and not before["complete"]
    lathe("run", "toy-paper", "--scale", "desk", "--jobs", "1", code=1)
    after = result(lathe.folder, "desk")
    assert after["complete"] and after["claims"][0] == before["claims"][0]
    assert after["started"] >= before["started"] and len(after["claims"]) == 5


def test_an_interrupted_run_says_how_to_go_on_and_leaves_no_process(lathe):
    running = start_desk_run(lathe)
    os.killpg(running.pid, signal.SIGINT)  # what Ctrl-C does: every process of the terminal gets it
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert told.strip().splitlines()[-1].startswith("lathe: interrupted; finished claims are kept")
    assert "Traceback" not in told
    give_up = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < give_up:
            os.killpg(running.pid, 0)
            time.sleep(0.1)


def test_changed_seeds_do_not_resume_an_old_run(lathe):
    lathe("run", "toy-paper", code=3, TOY_BREAKS="1")
    lathe("run", "toy-paper", "--seeds", "1")
    assert result(lathe.folder)["claims"][1]["seeds"] == 1


def test_one_claim_is_measured_anew_and_the_others_are_kept(lathe):
    folder, recorded = lathe.folder / "runs" / "toy-paper" / "smoke", lathe.folder / "recorded"
    lathe("run", "toy-paper", "--record", "recorded")
    whole = json.loads((folder / "result.json").read_text())
    whole["claims"][0]["note"] = "kept"
    (folder / "result.json").write_text(json.dumps(whole))
    lathe("run", "toy-paper", "--claim", "C2", "--claim", "C5", "--record", "recorded")
    found = json.loads((folder / "result.json").read_text())
    assert found["complete"] and found["started"] >= whole["started"]
    assert [claim["id"] for claim in found["claims"]] == ["C1", "C2", "C3", "C4", "C5"]
    assert found["claims"][0]["note"] == "kept" and found["claims"][1]["value"] == whole["claims"][1]["value"]
    first = json.loads((recorded / "toy-paper" / "smoke.json").read_text())["claims"][0]
    assert first["measured"] and first["note"] != "kept"  # from the record, whatever has become of the run
    lathe("run", "toy-paper", "--claim", "C2", "--output", "elsewhere")
    alone = json.loads((lathe.folder / "elsewhere" / "toy-paper" / "smoke" / "result.json").read_text())
    assert [claim["id"] for claim in alone["claims"]] == ["C2"] and not alone["complete"]
    whole["machine"]["processor"] = "abacus"
    (folder / "result.json").write_text(json.dumps(whole))
    done = lathe("run", "toy-paper", "--claim", "C2", code=2)
    assert "abacus" in done.stderr and "measure all claims" in done.stderr
    assert "no claim C9; it has C1, C2" in lathe("run", "toy-paper", "--claim", "C9", code=2).stderr


def test_a_half_written_result_is_replaced(lathe):
    path = lathe.folder / "runs/toy-paper/smoke/result.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 1, "cla')
    lathe("list", code=2)
    lathe("run", "toy-paper")
    assert result(lathe.folder)["complete"]


def test_a_cluster_gives_the_numbers_of_this_machine(lathe):
    pytest.importorskip("ray")
    lathe("run", "toy-paper", "deep-learning-theory", "--jobs", "2")
    alone = {
        slug: json.loads((lathe.folder / f"runs/{slug}/smoke/result.json").read_text())
        for slug in ("toy-paper", "deep-learning-theory")
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": lathe.environment}
    start = [ray, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    subprocess.run(
        [*start, "--include-dashboard=false", "--object-store-memory=100000000"], check=True, timeout=120, **quiet
    )
    try:
        lathe("run", "toy-paper", "deep-learning-theory", "--cluster", f"127.0.0.1:{port}", "--fresh")
    finally:
        subprocess.run([ray, "stop", "--force"], check=False, timeout=120, **quiet)
    for slug, before in alone.items():
        remote = json.loads((lathe.folder / f"runs/{slug}/smoke/result.json").read_text())
        ours = {c["id"]: c for c in before["claims"]}
        for claim in remote["claims"]:
            if claim["unit"] not in ("s", "ms"):
                assert claim["value"] == ours[claim["id"]]["value"], (slug, claim["id"])


def test_a_cluster_that_nobody_answers_for_is_one_line_and_2(lathe):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = lathe("run", "toy-paper", "--cluster", f"127.0.0.1:{port}", code=2)
    assert done.stderr.strip().splitlines()[-1].startswith(f"lathe: no Ray cluster answers at 127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "toy-papr"), "did you mean toy-paper"),
        (("run", "toy-paper", "--scale", "huge"), "--scale must be smoke, desk or full, got 'huge'"),
        (("run", "toy-paper", "--device", "abacus"), "--device 'abacus' cannot be used here"),
        (("run", "toy-paper", "--cluster", "nonsense"), "is not auto, HOST:PORT"),
        (("show", "nothing-at-all"), "no paper named 'nothing-at-all'"),
        (("show", "toy-paper"), "lathe run toy-paper"),
        (("data", "get", "nothing-at-all"), "nothing-at-all"),
        (("bench",), "benchmarks/ is not here"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(lathe, arguments, told):
    done = lathe(*arguments, code=2)
    assert told in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_output_folder_that_cannot_be_written_is_one_line_and_2(lathe):
    (lathe.folder / "runs").write_text("a file, no folder")
    done = lathe("run", "toy-paper", code=2)
    assert done.stderr.startswith("lathe: cannot write runs/toy-paper/smoke/result.json")


def test_a_full_disk_is_one_line_and_keeps_what_was_measured(lathe):
    full = "/dev/full"
    if not os.path.exists(full):
        pytest.skip("no /dev/full here")
    from lathe.studies.engine import ledger

    path = lathe.folder / "result.json"
    ledger.write(path, {"format": 1, "claims": []})
    before = path.read_text()
    original = ledger.tempfile.NamedTemporaryFile
    try:
        ledger.tempfile.NamedTemporaryFile = lambda *a, **k: open(full, "w")  # noqa: SIM115
        with pytest.raises(ledger.LedgerError, match=r"No space left"):
            ledger.write(path, {"format": 1, "claims": ["x" * 100_000]})
    finally:
        ledger.tempfile.NamedTemporaryFile = original
    assert path.read_text() == before


def test_list_and_show_tell_what_was_measured(lathe):
    lathe("run", "toy-paper")
    papers = {paper["slug"]: paper for paper in json.loads(lathe("list", "--json").stdout)}
    toy = papers["toy-paper"]
    assert {"slug", "title", "arxiv", "area", "module", "claims"} <= set(toy)
    first = toy["claims"][0]
    assert first["kind"] == "exact" and first["text"].startswith("One and one is <script>")
    assert set(first["scales"]) == {"smoke", "desk", "full"}
    assert first["scales"]["smoke"] == {"verdict": "holds", "value": 2.0, "baseline": None, "spread": None, "seeds": 1}
    assert first["scales"]["desk"]["verdict"] is None
    shown = lathe("show", "toy-paper").stdout
    assert "Shifted normals have a positive mean" in shown and "figures: C2" in shown
    lathe("show", "toy-paper", "--figure", "C2.png")
    assert (lathe.folder / "C2.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "(C2)" in lathe("show", "toy-paper", "--figure", "C1.png", code=2).stderr


def test_help_is_quick_and_json_goes_to_standard_output_alone(lathe):
    done = lathe("run", "toy-paper", "--json")
    assert json.loads(done.stdout)[0]["slug"] == "toy-paper" and "toy-paper C1" in done.stderr
    check = (
        "import sys, lathe.cli\n"
        "sys.argv = ['lathe', '--help']\n"
        "try: lathe.cli.main()\n"
        "except SystemExit: assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)
