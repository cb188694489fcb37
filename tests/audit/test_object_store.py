"""Audits from and to an object store: the same rows as on a disk, whatever the store and the processes do meanwhile."""

import gzip
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import zstandard
from support.faulty_proxy import Fault, Request
from support.object_store import KEY, SECRET, Store, knowing, object_store
from support.ray_processes import kill, wait_until
from support.tiny_run import tiny_config

from safer_ray.audit.estimate import estimate
from safer_ray.audit.run import Audit, audit_corpus
from safer_ray.audit.summary import close_audit
from safer_ray.cli.app import main
from safer_ray.config.sections import PairsConfig, RayConfig, ScoresConfig, SourceConfig
from safer_ray.data.source_files import find_files, source_files
from safer_ray.data.sources import plan_sources, read_raw
from safer_ray.errors import SaferError, UserError
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.run import run as run_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.storage import lock
from safer_ray.storage import remote as remote_module
from safer_ray.storage.artifacts import Artifact, Place, read_parts
from safer_ray.storage.files import as_path, names_in, read_json, write_json, writing
from safer_ray.storage.owners import this_process
from safer_ray.storage.quarantine import quarantine_rows

SMALL = ("corpus.train_per_section=80", "corpus.heldout_per_section=20", "sae.steps=30")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Artifact:
    config = tiny_config(tmp_path_factory.mktemp("made"), *SMALL)
    return run_stages(config, LocalRunner(), until="auditor").artifacts["auditor"]


@pytest.fixture(scope="module")
def lines(bundle) -> list[str]:
    """Rows that can be used, as the corpus has them."""
    (corpus,), (pairs,) = (bundle.path.parent.glob(f"{stage}-*") for stage in ("corpus", "pairs"))
    found = (corpus / "train.jsonl").read_bytes().splitlines(keepends=True)
    positions = [int(key.rpartition("#")[2]) for key in read_parts(pairs)["row_key"].to_pylist()]
    return [found[position].decode() for position in positions]


@pytest.fixture(scope="module")
def server():
    with object_store() as store:
        yield store


@pytest.fixture
def store(server, monkeypatch, request) -> Store:
    """The store as users reach it, with a bucket for this test."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    remote_module._filesystem.cache_clear()
    server.proxy.reset()
    server.bucket = f"b{abs(hash(request.node.name))}"
    server.make_bucket(server.bucket)
    yield server
    server.proxy.reset()
    remote_module._filesystem.cache_clear()


@pytest.fixture(scope="module")
def files(lines) -> dict[str, bytes]:
    """56 rows in three files, one of them of no use."""
    texts = {"a.jsonl": [*lines[:25], "no row\n"], "more/b.jsonl": lines[25:45], "c.jsonl": lines[45:55]}
    return {name: "".join(text).encode() for name, text in texts.items()}


@pytest.fixture
def corpus(store, files) -> str:
    for name, content in files.items():
        store.put(f"{store.bucket}/corpus/{name}", content)
    return f"s3://{store.bucket}/corpus/"


@pytest.fixture(scope="module")
def wanted(files, bundle, tmp_path_factory) -> Path:
    """The audit of the same files on a disk."""
    folder = tmp_path_factory.mktemp("wanted")
    for name, content in files.items():
        path = folder / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    run(audit_of(bundle, folder / "corpus"), folder / "out")
    return folder / "out"


def audit_of(bundle: Artifact, path: object) -> Audit:
    return Audit(bundle, SourceConfig(path=str(path)), ScoresConfig(flag_quantile=0.3), fragment_rows=10)


def run(audit: Audit, out: str | Path) -> dict:
    out = as_path(out)
    out.mkdir(exist_ok=True)
    counts = audit_corpus(audit, out, LocalRunner())
    return close_audit(audit, out, counts, 1.0)


def assert_same_scores(one: str | Path, other: str | Path) -> None:
    """The same of every row, up to what other threads make of sums."""
    found, known = (read_parts(as_path(out) / "scores") for out in (one, other))
    assert found["row_key"].equals(known["row_key"])
    assert found["score"].to_numpy() == pytest.approx(known["score"].to_numpy(), rel=1e-5, abs=1e-5)
    assert names_in(as_path(one) / "done") == names_in(as_path(other) / "done")


def assert_alike(one: str | Path, other: str | Path) -> None:
    """Two audits of one process say the same of every row."""
    one, other = as_path(one), as_path(other)
    assert read_parts(one / "scores").equals(read_parts(other / "scores"))
    assert quarantine_rows(one).equals(quarantine_rows(other))
    assert (one / "flagged.jsonl").read_bytes() == (other / "flagged.jsonl").read_bytes()
    assert read_json(one / "summary.json") | {"pairs": ""} == read_json(other / "summary.json") | {"pairs": ""}
    assert names_in(one / "done") == names_in(other / "done")


def out_of(store: Store) -> str:
    return f"s3://{store.bucket}/audits/one"


# Without faults


def test_an_audit_in_a_store_equals_one_on_a_disk_row_by_row(store, corpus, bundle, wanted):
    summary = run(audit_of(bundle, corpus), out_of(store))
    assert summary["rows"] == {"read": 56, "scored": 55, "quarantined": 1}
    assert_alike(out_of(store), wanted)
    names = {name.removeprefix(f"{store.bucket}/audits/one/") for name in store.objects(f"{store.bucket}/audits")}
    below = {str(path.relative_to(wanted)) for path in wanted.rglob("*") if path.is_file()}
    assert names == below
    before = store.objects(f"{store.bucket}/audits/one/scores")
    store.proxy.reset()
    assert run(audit_of(bundle, corpus), out_of(store)) == summary
    assert store.objects(f"{store.bucket}/audits/one/scores") == before
    assert store.proxy.count("PUT", "/scores/") == 0


def test_every_kind_of_object_and_globs_are_read_as_files_are(store, lines, tmp_path):
    folder, rows = tmp_path / "kinds", [json.loads(line) for line in lines[:30]]
    folder.mkdir()
    table = pa.table({name: [str(row[name]) for row in rows] for name in ("prompt", "chosen", "rejected")})
    text = "".join(lines[:30]).encode()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(text))
    (folder / "c.json").write_text(json.dumps(rows))
    pq.write_table(table, folder / "d.parquet", row_group_size=7)
    pa.csv.write_csv(table, folder / "e.csv")
    (folder / "_hidden.jsonl").write_text("{}")
    for path in folder.iterdir():
        store.put(f"{store.bucket}/kinds/{path.name}", path.read_bytes())

    def raw(place: object) -> list[dict]:
        source = SourceConfig(path=str(place))
        return [row for f in plan_sources([source], rows=8) for row in read_raw(f, source).to_pylist()]

    there = f"s3://{store.bucket}/kinds"
    assert raw(there) == raw(folder)
    assert len(raw(there)) == 150
    for pattern in ("*.jsonl.*", "d.parquet", "**/[ce].*"):
        assert raw(f"{there}/{pattern}") == raw(folder / pattern)
    with pytest.raises(UserError, match=r"no file, folder or glob at s3://.*/nothing"):
        source_files(SourceConfig(path=f"s3://{store.bucket}/nothing"))


def test_what_lies_beside_the_rows_and_what_folders_tell_is_the_same_in_a_store(store, tmp_path):
    row = {"prompt": "Où?", "chosen": "Là.", "rejected": "Ici."}
    files = {
        "lang=fr/data/train-00000-of-00001.jsonl": json.dumps(row, ensure_ascii=False).encode("utf-16"),
        "lang=fr/data/test-00000-of-00001.jsonl.gz": gzip.compress(json.dumps(row).encode("utf-16-le")),
        "metadata.json": b'{"rows": 2}',
        "README.md": b"# Rows",
        ".cache/a.jsonl": b"{}",
        "pointer.csv": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
        "page.jsonl.gz": b"<html>",
        "text.parquet": b"{}",
        "torn.jsonl.gz": gzip.compress(b"{}\n" * 10_000)[:-20],
    }
    refused = ("pointer.csv", "page.jsonl.gz", "text.parquet", "torn.jsonl.gz")
    for name, data in files.items():
        folder = "refused" if name in refused else "beside"
        (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_bytes(data)
        store.put(f"{store.bucket}/{folder}/{name}", data)

    def read(place: object, **settings: str) -> tuple[list[dict], list[str], tuple[str, ...]]:
        source = SourceConfig(path=str(place), **settings)  # type: ignore[arg-type]
        found = find_files(source)
        rows = [row for f in plan_sources([source]) for row in read_raw(f, source).to_pylist()]
        return rows, sorted(found.left_out.values()), found.told

    there = f"s3://{store.bucket}/beside"
    assert read(there) == read(tmp_path / "beside")
    assert [json.loads(each["raw"]) for each in read(there)[0]] == [row | {"lang": "fr"}] * 2
    assert len(read(there, split="test")[0]) == 1
    assert read(there)[1:] == (
        [1],
        (
            "files that hold no rows are left out: metadata.json",
            "files of other kinds are not read: README.md",
            "files of several splits are read: test (1 file), train (1 file) (--split NAME reads one)",
        ),
    )
    told = ("Git LFS pointer", "an HTML page", "no parquet file", "damaged or incomplete, write it again")
    for name, message in zip(refused, told, strict=True):
        with pytest.raises(UserError, match=message):
            read(f"s3://{store.bucket}/refused/{name}")


def large(path: Path) -> None:
    """Some 8 MB of pairs in one row group, record batch, array or file of lines."""
    random = np.random.default_rng(0)
    rows = [{side: random.bytes(330).hex() for side in ("prompt", "chosen", "rejected")} for _ in range(4000)]
    if path.suffix == ".parquet":
        table, small = pa.Table.from_pylist(rows), {"write_batch_size": 50, "data_page_size": 2**16}
        pq.write_table(table, path, use_dictionary=False, **small)  # type: ignore[arg-type]
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json", "a.jsonl"])
def test_each_byte_of_a_large_object_is_fetched_once_by_who_reads_it(store, tmp_path, name):
    large(tmp_path / name)
    size = (tmp_path / name).stat().st_size
    store.put(f"{store.bucket}/{name}", (tmp_path / name).read_bytes())
    source = SourceConfig(path=f"s3://{store.bucket}/{name}")
    fragments = plan_sources([source], rows=200)
    planning = store.proxy.fetched[f"/{store.bucket}/{name}"]
    assert planning < size * (0.3 if name == "a.parquet" else 2.1)  # of others rows are counted, behind a look at a few
    store.proxy.reset()
    assert sum(len(read_raw(fragment, source)) for fragment in fragments) == 4000
    assert len(fragments) == 20
    assert store.proxy.fetched[f"/{store.bucket}/{name}"] < 1.1 * size
    assert store.proxy.count("GET", name) < 500


def test_an_estimate_reads_a_store_and_writes_nothing(store, corpus, bundle):
    before = store.objects(store.bucket)
    assert estimate(audit_of(bundle, corpus), 1).rows == 56
    assert store.objects(store.bucket) == before


def test_any_filesystem_of_fsspec_will_do(store, files, bundle, wanted):
    for name, content in files.items():
        as_path(f"memory://{store.bucket}/corpus/{name}").write([content])
    run(audit_of(bundle, f"memory://{store.bucket}/corpus"), f"memory://{store.bucket}/out")
    assert_alike(f"memory://{store.bucket}/out", wanted)


# Growth and change


def test_new_objects_are_audited_and_changed_ones_refused_and_named(store, corpus, lines, bundle, wanted):
    run(audit_of(bundle, corpus), out_of(store))
    old = store.objects(f"{store.bucket}/audits/one/scores")
    store.put(f"{store.bucket}/corpus/new.jsonl", "".join(lines[60:72]).encode())
    grown = run(audit_of(bundle, corpus), out_of(store))
    assert grown["rows"]["scored"] == 67
    assert old.items() <= store.objects(f"{store.bucket}/audits/one/scores").items()
    found, known = read_parts(as_path(out_of(store)) / "scores"), read_parts(wanted / "scores")
    assert found.slice(0, len(known)).equals(known)
    assert found["row_key"].to_pylist()[len(known) :] == [f"new.jsonl#{i}" for i in range(12)]
    store.put(f"{store.bucket}/corpus/c.jsonl", "".join(reversed(lines[45:55])).encode())  # as long as it was
    with pytest.raises(UserError, match=rf"s3://{store.bucket}/corpus/c\.jsonl changed since it was planned"):
        run(audit_of(bundle, corpus), out_of(store))


def test_the_same_objects_elsewhere_are_not_audited_again(store, corpus, files, bundle, wanted):
    run(audit_of(bundle, corpus), out_of(store))
    for name, content in files.items():
        store.put(f"{store.bucket}/copied/here/{name}", content)
    (as_path(out_of(store)) / "done/00000003.json").unlink()  # so that one fragment is read from the copy
    for place in (f"s3://{store.bucket}/copied/here", f"s3://{store.bucket}/copied/here/**/*.jsonl", corpus):
        assert run(audit_of(bundle, place), out_of(store))["rows"] == {"read": 56, "scored": 55, "quarantined": 1}
    assert_same_scores(out_of(store), wanted)
    store.put(f"{store.bucket}/copied/here/a.jsonl", files["c.jsonl"])
    with pytest.raises(UserError, match=rf"{out_of(store)} holds the audit of another corpus: its a\.jsonl"):
        run(audit_of(bundle, f"s3://{store.bucket}/copied/here"), out_of(store))


@pytest.mark.parametrize("parts", [1, 2])
def test_objects_that_were_copied_to_a_disk_are_known_by_their_md5_or_refused(
    store, lines, bundle, wanted, tmp_path, parts
):
    """An object that was uploaded in several parts has an ETag that is no MD5."""
    content = "".join(lines[:25]).encode()
    if parts == 1:
        as_path(f"s3://{store.bucket}/one/a.jsonl").write([content])
    else:
        store.put(f"{store.bucket}/one/a.jsonl", content)
    run(audit_of(bundle, f"s3://{store.bucket}/one"), out_of(store))
    (tmp_path / "a.jsonl").write_bytes(content)
    if parts == 1:
        assert run(audit_of(bundle, tmp_path), out_of(store))["rows"]["read"] == 25
    else:
        with pytest.raises(UserError, match=r"whether .*/a\.jsonl is what .* audited as .* cannot be told"):
            run(audit_of(bundle, tmp_path), out_of(store))


def test_a_corpus_that_went_from_a_disk_to_a_store_is_the_same(store, corpus, bundle, wanted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(wanted, out)
    before = {path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir()}
    assert run(audit_of(bundle, corpus), out)["rows"]["read"] == 56
    assert {path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir()} == before


def test_an_audit_that_lies_below_its_own_source_leaves_itself_out(store, corpus, bundle, wanted):
    out = f"{corpus}results/one"
    for _ in range(2):
        summary = run(audit_of(bundle, corpus), out)
        assert summary["rows"] == {"read": 56, "scored": 55, "quarantined": 1}
    assert list(summary["files"]["left_out"]) == [out]
    assert_same_scores(out, wanted)


def test_pairs_of_changed_objects_are_others_and_of_copied_ones_the_same(store, corpus, files, lines, tmp_path):
    def made(path: str) -> Artifact:
        ctx = StageContext(Place(tmp_path), LocalRunner())
        return model_stages.pairs(ctx, PairsConfig(sources=(SourceConfig(path=path),)))

    first = made(corpus)
    for name, content in files.items():
        store.put(f"{store.bucket}/copy/{name}", content)
    assert made(f"s3://{store.bucket}/copy").name == first.name
    store.put(f"{store.bucket}/corpus/c.jsonl", "".join(lines[60:70]).encode())
    changed = made(corpus)
    assert changed.name != first.name
    ids = [json.loads(line)["id"] for line in lines[60:70]]
    assert set(ids) <= set(read_parts(changed.path)["pair_id"].to_pylist())


def test_an_object_that_changes_while_it_is_read_is_refused(store, corpus, lines, bundle):
    def overwrite(request: Request) -> None:
        if request.method == "PUT" and "/done/00000001" in request.path:
            store.put(f"{store.bucket}/corpus/more/b.jsonl", "".join(lines[70:90]).encode())

    store.proxy.rule = overwrite
    with pytest.raises(UserError, match=r"more/b\.jsonl changed since it was planned"):
        run(audit_of(bundle, corpus), out_of(store))
    assert len(names_in(as_path(out_of(store)) / "done")) < 6


# A store that fails


def test_requests_that_fail_are_tried_again_and_nothing_is_lost_or_doubled(store, corpus, bundle, wanted):
    kinds = {
        "PUT": (Fault(status=503), Fault(cut="upload"), Fault(status=500), Fault(cut="answer")),
        "GET": (Fault(cut="reply"), Fault(status=503)),
    }

    def every_fifteenth(request: Request) -> Fault | None:
        faults = kinds.get(request.method)
        return faults[request.number // 15 % len(faults)] if faults and request.number % 15 == 0 else None

    store.proxy.rule = every_fifteenth
    run(audit_of(bundle, corpus), out_of(store))
    assert len(store.proxy.faults) > 6
    store.proxy.reset()
    assert_alike(out_of(store), wanted)


def test_an_upload_that_fails_for_good_is_told_and_the_same_command_finishes(
    store, corpus, bundle, wanted, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    store.proxy.rule = lambda r: Fault(status=503) if r.method == "PUT" and "scores/part-00000002" in r.path else None
    part = rf"s3://{store.bucket}/audits/one/scores/part-00000002\.parquet"
    with pytest.raises(
        SaferError, match=rf"cannot write {part}: .*SLOW_DOWN.*; check .* then run the same command again"
    ):
        run(audit_of(bundle, corpus), out_of(store))
    done = store.objects(f"{store.bucket}/audits/one/done")
    assert len(done) == 2
    store.proxy.reset()
    run(audit_of(bundle, corpus), out_of(store))
    assert done.items() <= store.objects(f"{store.bucket}/audits/one/done").items()
    assert_alike(out_of(store), wanted)


def test_a_read_that_fails_for_good_is_told(store, corpus, bundle, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    store.proxy.rule = lambda r: Fault(cut="reply") if r.method == "GET" and r.path.endswith("b.jsonl") else None
    with pytest.raises(
        SaferError, match=rf"cannot read s3://{store.bucket}/corpus/more/b\.jsonl: .*; check the address"
    ):
        run(audit_of(bundle, corpus), out_of(store))


def test_no_bucket_and_no_server_are_told(store, corpus, bundle, monkeypatch):
    with pytest.raises(SaferError, match=r"cannot write s3://no-such-bucket/out/audit.json: .*NO_SUCH_BUCKET"):
        run(audit_of(bundle, corpus), "s3://no-such-bucket/out")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    remote_module._filesystem.cache_clear()
    with pytest.raises(
        SaferError, match=rf"cannot read s3://{store.bucket}/audits/one/audit.json: .*connect.*; check the address"
    ):
        run(audit_of(bundle, corpus), out_of(store))


def test_a_slow_store_is_waited_for(store, corpus, bundle, wanted):
    slow = iter([3.5])
    store.proxy.rule = lambda r: Fault(delay=next(slow, 0.002) if r.method == "PUT" else 0.002)
    run(audit_of(bundle, corpus), out_of(store))
    assert store.proxy.count("PUT", "/audit.json") == 1
    assert_alike(out_of(store), wanted)


def test_a_large_object_comes_in_parts_and_is_whole_or_absent(store, monkeypatch):
    blocks = [os.urandom(2**20) for _ in range(12)]
    place = as_path(f"s3://{store.bucket}/large")
    with writing(place) as stream:
        stream.writelines(blocks)
    assert place.read_bytes() == b"".join(blocks)
    assert store.proxy.count("POST", "/large") == 2
    place.unlink()

    def interrupted():
        yield from blocks
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place.write(interrupted())
    assert not place.exists()


# Accounts


def test_a_done_entry_without_its_part_is_told_and_a_part_without_it_done_again(store, corpus, bundle, wanted):
    run(audit_of(bundle, corpus), out_of(store))
    folder = f"{store.bucket}/audits/one"
    store.delete(f"{folder}/scores/part-00000001.parquet")
    told = rf"{out_of(store)}: the accounts do not close in 1 of 6 fragments \(fragment 1: 10 rows read, 0 scored"
    with pytest.raises(SaferError, match=told):
        run(audit_of(bundle, corpus), out_of(store))
    store.delete(f"{folder}/done/00000001.json")
    store.delete(f"{folder}/done/00000003.json")
    run(audit_of(bundle, corpus), out_of(store))
    assert_alike(out_of(store), wanted)
    audit_corpus(audit_of(bundle, corpus)._replace(fragment_rows=30), as_path(out_of(store)), LocalRunner(), fresh=True)
    assert len(store.objects(f"{folder}/scores")) == 3


# Drivers


def command(bundle: Artifact, corpus: str, out: str) -> list[str]:
    words = ["audit", "--auditor", bundle.path, "--pairs", corpus, "--out", out, "--fragment-rows", 10]
    return list(map(str, [*words, "--flag-quantile", 0.3]))


@pytest.mark.slow
def test_a_second_driver_is_refused_and_a_killed_one_taken_up_again(
    store, corpus, bundle, wanted, capsys, monkeypatch, caplog
):
    caplog.set_level(logging.DEBUG)
    killed = threading.Event()

    def rule(request: Request) -> Fault | None:
        """The driver comes as far as the third part, and waits there."""
        if request.method == "PUT" and "scores/part-00000002" in request.path and not killed.is_set():
            return Fault(delay=30)
        return None

    store.proxy.rule = rule
    words = command(bundle, corpus, out_of(store))
    driver = [sys.executable, "-c", "from safer_ray.cli.app import main; main()", *words]
    process = subprocess.Popen(driver, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: store.proxy.count("PUT", "scores/part-00000002"), 60, process)
    monkeypatch.setattr(sys, "argv", ["safer-ray", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"{out_of(store)} is in use by process {process.pid} on" in capsys.readouterr().err.replace("\n", " ")
    kill(process)
    killed.set()
    done = store.objects(f"{store.bucket}/audits/one/done")
    assert len(done) == 2
    assert (as_path(out_of(store)) / "run.lock").exists()
    with pytest.raises(SystemExit, match="0"):
        main()
    said = capsys.readouterr()
    assert f"{out_of(store)}/flagged.jsonl" in said.out.replace("\n", "")
    assert done.items() <= store.objects(f"{store.bucket}/audits/one/done").items()
    assert_same_scores(out_of(store), wanted)
    assert not (as_path(out_of(store)) / "run.lock").exists()
    written = [store.get(name) for name in store.objects(f"{store.bucket}/audits") if name.endswith("json")]
    told = [said.out, said.err, caplog.text, *(content.decode() for content in written)]
    assert not any(KEY in text or SECRET in text for text in told)


def test_a_lock_is_lost_to_who_wrote_last_and_a_silent_host_is_believed_for_a_minute(store, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.3)
    folder = as_path(f"s3://{store.bucket}/run")
    other = {"host": "elsewhere", "pid": 1, "started": 1.0}
    timer = threading.Timer(0.15, write_json, (other, folder / "run.lock"))
    timer.start()
    with pytest.raises(UserError, match="in use by process 1 on elsewhere"), lock.locked(folder):
        pass
    timer.join()
    with pytest.raises(UserError, match="in use by process 1 on elsewhere"), lock.locked(folder):
        pass
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.0)
    monkeypatch.setattr(lock, "OBJECT_HEARTBEAT_SECONDS", 1.0)
    with lock.locked(folder):
        assert read_json(folder / "run.lock")["pid"] == os.getpid()
    assert not (folder / "run.lock").exists()


def test_a_heartbeat_that_fails_is_told_and_does_not_end_the_run(store, monkeypatch, caplog):
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(lock, "OBJECT_HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    folder = as_path(f"s3://{store.bucket}/run")
    with lock.locked(folder):
        store.proxy.rule = lambda r: Fault(status=503) if r.method == "PUT" else None
        wait_until(lambda: "heartbeat of this run failed" in caplog.text, 10)
        store.proxy.reset()
        wait_until(lambda: store.proxy.count("PUT", "run.lock"), 10)


def test_a_run_whose_lock_object_another_has_written_ends_with_one_line(store, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(lock, "OBJECT_HEARTBEAT_SECONDS", 0.1)
    folder = as_path(f"s3://{store.bucket}/run")
    other = this_process() | {"host": "elsewhere", "pid": 1, "boot": "another"}
    message = rf"^{folder}/run.lock names process 1 on elsewhere: this run has lost its folder and ends; .* kept$"

    def work():
        with lock.locked(folder):
            write_json(other, folder / "run.lock")
            time.sleep(30)

    with pytest.raises(lock.LockLost, match=message):
        work()
    assert read_json(folder / "run.lock") == other


# Names


def test_paths_of_a_store_travel_and_behave_as_paths_do(store):
    path = as_path("s3://bucket/a folder/x.tar.gz")
    assert pickle.loads(pickle.dumps(path)) == path  # noqa: S301
    assert str(path / "y") == "s3://bucket/a folder/x.tar.gz/y"
    assert (path.name, path.suffix, str(path.parent.parent)) == ("x.tar.gz", ".gz", "s3://bucket")
    assert str(path.with_suffix(".zst")) == "s3://bucket/a folder/x.tar.zst"
    assert sorted([as_path("s3://b/a-b"), as_path("s3://b/a/b")]) == sorted(
        [as_path("s3://b/a/b"), as_path("s3://b/a-b")]
    )
    assert as_path("file:///tmp/a%20b") == Path("/tmp/a b")
    assert as_path("plain/path") == Path("plain/path")


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://KEY:word@bucket/x", "holds credentials"),
        ("s3:///x", "names no bucket"),
        ("nonsense://bucket/x", "cannot reach nonsense://bucket/x"),
    ],
)
def test_uris_that_cannot_be_used_are_refused_and_secrets_not_repeated(uri, told):
    with pytest.raises(UserError, match=told) as raised:
        as_path(uri)
    assert "word" not in str(raised.value)


# On Ray


@pytest.mark.slow
def test_workers_on_ray_read_and_write_the_store(store, corpus, bundle, wanted, ray_session, monkeypatch):
    from safer_ray.distributed.ray_runner import RayRunner

    job = Audit.job

    def job_for_workers(audit: Audit):
        made = job(audit)
        return replace(made, **knowing(made, store.environment()))

    monkeypatch.setattr(Audit, "job", job_for_workers)
    audit, out = audit_of(bundle, f"{corpus}more"), as_path(out_of(store))
    counts = audit_corpus(audit, out, RayRunner(RayConfig(max_actors=1, tasks=1)))
    assert close_audit(audit, out, counts, 1.0)["rows"] == {"read": 20, "scored": 20, "quarantined": 0}
    found, known = read_parts(out / "scores"), read_parts(wanted / "scores").slice(35)
    assert found["pair_id"].equals(known["pair_id"])
    assert found["score"].to_numpy() == pytest.approx(known["score"].to_numpy(), rel=1e-5, abs=1e-5)
    assert len(names_in(out / "done")) == 2
