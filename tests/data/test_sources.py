"""Rows of files, folders and hub datasets; each fault named by its option, file and row."""

import gzip
import json
import logging
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import datasets
import pytest

from grpo_jax.data import sources
from grpo_jax.data.sources import Source, has_splits, read

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"{i}+1?"}],
        "answer": i + 1,
        "text": "ä" if i else None,
        "tests": [1, 2],
        "facts": {"level": None, "kind": "x"},
        "nothing": None,
    }
    for i in range(3)
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` converts lies in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".arrow":
        datasets.Dataset.from_list(rows).save_to_disk(path.parent / "saved")
        shutil.copy(path.parent / "saved" / "data-00000-of-00001.arrow", path)
    return path


def rows_of(path, name="", split="") -> list[dict]:
    return [row for _, row in read(Source(str(path), name, split))]


def refusal(path, name="", split="", options=None) -> str:
    source = Source(str(path), name, split, *([options] if options else []))
    with pytest.raises(ValueError) as error:
        list(read(source))
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix, capfd):
    path = write(tmp_path / f"problems{suffix}", ROWS)
    capfd.readouterr()
    found = list(read(Source(str(path), "", "ignored")))
    assert [row for _, row in found] == ROWS
    assert [where for where, _ in found] == [f"{path}, {_place(path)} {i}" for i in (1, 2, 3)]
    assert capfd.readouterr() == ("", "")  # no progress bars


def test_the_library_talks_as_before_when_a_file_was_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    assert level != datasets.logging.CRITICAL
    assert len(list(read(Source(str(tmp_path / "rows.jsonl"))))) == 1
    assert datasets.logging.get_verbosity() == level
    assert datasets.are_progress_bars_disabled() == bars


def test_a_byte_order_mark_begins_a_file_and_no_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('\ufeff{"a": 1}\n{"a": 2}\n')
    source = Source(str(tmp_path / "rows.jsonl"))
    assert [row["a"] for _, row in read(source)] == [1, 2]
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\ufeff{"a": 2}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is not JSON"):
        list(read(source))


def test_a_csv_file(tmp_path):
    path = write(tmp_path / "p.csv", [{"prompt": "a, b", "answer": 3, "note": None}])
    assert rows_of(path) == [{"prompt": "a, b", "answer": 3, "note": None}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow", ".csv"])
def test_a_changed_file_is_read_anew(tmp_path, suffix):
    """Also where its date of change is the old one, as `rsync -t` and images of containers do."""
    for word in ("old", "new"):
        path = write(tmp_path / f"p{suffix}", [{"prompt": word}])
        os.utime(path, (1e9, 1e9))
        assert rows_of(path) == [{"prompt": word}]


@pytest.mark.parametrize("name", ["d[1].csv", "d*.csv", "d?.csv", "d[1].jsonl", "d*.parquet"])
def test_no_character_of_a_files_name_is_a_pattern(tmp_path, name):
    mine = write(tmp_path / name, [{"prompt": "mine"}])
    write(tmp_path / f"d1{mine.suffix}", [{"prompt": "another's"}])
    assert list(read(Source(str(mine)))) == [(f"{mine}, {_place(mine)} 1", {"prompt": "mine"})]


def _place(path: Path) -> str:
    return "line" if path.suffix == ".jsonl" else "row"


def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path):
    """`datasets` would read d1."""
    write(tmp_path / "d1" / "train.jsonl", ROWS)
    write(tmp_path / "d[1]" / "train.jsonl", ROWS)
    message = refusal(tmp_path / "d[1]", split="train")
    assert f"is at {tmp_path}/d[1]" in message and "rename it" in message


@pytest.mark.parametrize("path", ["~nosuchuser/p.jsonl", "~nosuchuser/maths"])
def test_a_user_that_is_not_there_is_named(path):
    assert f"data.path = {path!r}: ~nosuchuser stands for nobody's" in refusal(path)
    with pytest.raises(ValueError, match="stands for nobody's"):
        has_splits(path)


def test_a_number_that_a_csv_reader_has_no_bits_for_is_named(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(f'prompt,answer\n"a,\nb",{2**62}\n2^70?,{2**70}\n')
    message = refusal(path)
    assert f"row 2 has {2**70} as `answer`" in message and "JSONL" in message
    path.write_text(f"prompt,answer\na,{2**62}\n2^70?,x{2**70}\n")
    assert rows_of(path)[1]["answer"] == f"x{2**70}"


def test_many_rows_are_numbered_across_batches(tmp_path):
    path = write(tmp_path / "p.parquet", [{"prompt": str(i)} for i in range(2500)])
    where, row = list(read(Source(str(path))))[2345]
    assert where == f"{path}, row 2346" and row == {"prompt": "2345"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow", ".csv"])
def test_a_file_of_no_bytes_has_no_rows(tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    path.touch()
    assert rows_of(path) == []


def test_a_file_of_columns_alone_has_no_rows(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,answer\n")
    assert rows_of(tmp_path / "p.csv") == []
    datasets.Dataset.from_dict({"prompt": []}).to_parquet(tmp_path / "p.parquet")
    assert rows_of(tmp_path / "p.parquet") == []


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".arrow"])
def test_a_corrupt_file_is_named(tmp_path, suffix, caplog):
    logger = logging.getLogger("datasets")  # it does not propagate
    logger.addHandler(caplog.handler)
    path = tmp_path / f"p{suffix}"
    path.write_bytes(b"PAR1" + b"\x00nonsense" * 50)
    message = refusal(path)
    logger.removeHandler(caplog.handler)
    assert f"data.path: {path} cannot be read as {suffix[1:]} (" in message
    assert "DatasetGenerationError" not in message  # but what caused it
    assert not caplog.records  # the message says it all


def test_a_cut_parquet_file_is_named(tmp_path):
    path = write(tmp_path / "train.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} cannot be read as parquet" in refusal(tmp_path, split="train")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("1+1?")
    assert all(
        w in refusal(tmp_path / "p.txt") for w in ["p.txt is not a kind", ".jsonl, .json, .parq"]
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write(tmp_path / "p.jsonl", ROWS)
    path.chmod(0)
    assert "Permission denied" in refusal(path)


# --- What would fill the memory -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_line_without_end_is_refused_unread(tmp_path, suffix):
    """10 GB of which no byte is on the disk; reading them would take longer than the limit."""
    path = tmp_path / f"p{suffix}"
    path.write_text('{"prompt": "1+1="}\n' if suffix == ".jsonl" else "prompt\n1+1=\n")
    number = path.read_text().count("\n") + 1
    os.truncate(path, 10 * 10**9)
    tracemalloc.start()
    try:
        message = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * sources.MAX_ROW_BYTES
    finally:
        tracemalloc.stop()
    words = f"line {number} is longer than {sources.MAX_ROW_BYTES} bytes"
    assert str(path) in message and words in message


def test_a_json_file_that_is_too_large_as_a_whole_is_refused(tmp_path):
    path = write(tmp_path / "p.json", ROWS)
    os.truncate(path, sources.MAX_JSON_BYTES + 1)
    assert all(word in refusal(path) for word in [f"{path} has 2147483649 bytes", ".jsonl"])


def test_compressed_files_are_refused(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b"\n" * 10**6))
    assert "train.jsonl.gz is not a kind of file that is read" in refusal(tmp_path, split="train")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_nested_without_end_is_refused(tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    path.write_text('[{"a":' * 10**6 + "\n")
    words = {".jsonl": "line 1 is not JSON (", ".json": f"{path} cannot be read as json ("}
    assert words[suffix] in refusal(path)


# --- What would lead elsewhere, or run ------------------------------------------------------------


def test_files_that_a_readme_names_elsewhere_are_refused(tmp_path):
    write(tmp_path / "secret.jsonl", ROWS)
    folder = clone_of_a_hub_dataset(tmp_path / "clone")
    for pattern in (str(tmp_path / "secret.jsonl"), "../secret.jsonl", "main/../../sec*"):
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: main\n  data_files: {pattern}\n---\n"
        )
        assert "secret.jsonl, which does not belong to it" in refusal(folder, "main", "train")


def test_files_that_a_hub_dataset_names_elsewhere_are_refused(hub, tmp_path, monkeypatch):
    builder = datasets.load_dataset_builder(hub, "main")
    builder.config.data_files = {"train": [str(write(tmp_path / "secret.jsonl", ROWS))]}
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *path: builder)
    assert "secret.jsonl, which does not belong to it" in refusal(hub, "main", "train")


def test_files_that_a_saved_dataset_names_elsewhere_are_refused(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "secret")
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "train" / "state.json"
    said = json.loads(state.read_text())
    said["_data_files"] = [{"filename": "../../secret/data-00000-of-00001.arrow"}]
    state.write_text(json.dumps(said))
    message = refusal(tmp_path / "saved", split="train")
    assert "'../../secret/data-00000-of-00001.arrow', which is not a file beside it" in message
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["../secret"]}')
    message = refusal(tmp_path / "saved", split="../secret")
    assert "the split '../secret', which is no folder" in message


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("readme", [False, True])
def test_a_folder_behind_a_link_is_read(tmp_path, above, readme):
    folder = tmp_path / "real" / "clone"
    write(folder / "main" / "train.jsonl", ROWS)
    (folder / "main" / "train.jsonl").rename(tmp_path / "blob")
    (folder / "main" / "train.jsonl").symlink_to(tmp_path / "blob")  # as the hub's cache has it
    if readme:
        (folder / "README.md").write_text(CONFIGURATIONS.partition("  - split: test")[0] + "---\n")
    (tmp_path / "link").symlink_to(folder.parent if above else folder)
    path = tmp_path / "link" / "clone" if above else tmp_path / "link"
    assert rows_of(path, split="train") == ROWS


def test_what_a_readme_behind_a_link_names_elsewhere_is_refused(tmp_path):
    folder = clone_of_a_hub_dataset(tmp_path / "real" / "clone")
    write(tmp_path / "real" / "secret.jsonl", ROWS)
    (tmp_path / "link").symlink_to(folder)
    for name in ("../secret.jsonl", "main/../../secret.jsonl", f"{tmp_path}/real/secret.jsonl"):
        (folder / "README.md").write_text(CONFIGURATIONS.replace("main/train*", name))
        assert "secret.jsonl, which does not belong" in refusal(tmp_path / "link", "main", "train")


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert "there is no such file" in refusal(tmp_path / name)
    message = refusal(tmp_path, split="train")
    assert "cannot be read as a folder of data" in message


def test_a_pipe_in_a_saved_dataset_is_not_waited_for(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    [file] = (tmp_path / "saved").glob("*.arrow")
    file.unlink()
    os.mkfifo(file)
    assert "which is not a file beside it" in refusal(tmp_path / "saved")


def test_a_script_beside_the_data_is_not_run(tmp_path):
    folder, mark = tmp_path / "maths", tmp_path / "ran"
    write(folder / "train.jsonl", ROWS)
    (folder / "maths.py").write_text(f"open({str(mark)!r}, 'w')")
    try:
        found = rows_of(folder, split="train")
    except ValueError as error:
        assert "scripts are no longer supported" in str(error)
    else:
        assert found == ROWS
    assert not mark.exists()


# --- Folders --------------------------------------------------------------------------------------


def test_a_saved_dataset(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    found = list(read(Source(f"{tmp_path}/saved", "", "train")))
    assert [row for _, row in found] == ROWS
    assert found[2][0] == f"{tmp_path}/saved, row 3"
    assert not has_splits(f"{tmp_path}/saved")


def test_a_saved_dataset_with_shuffled_rows(tmp_path):
    datasets.Dataset.from_list(ROWS).select([2, 0]).save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == [ROWS[2], ROWS[0]]


def test_a_saved_dataset_shows_the_columns_of_its_format(tmp_path):
    made = datasets.Dataset.from_list(ROWS)
    made.set_format(columns=["answer", "prompt"])
    made.save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == [{k: r[k] for k in ("answer", "prompt")} for r in ROWS]


def test_a_saved_dictionary_of_splits(tmp_path):
    parts = {"train": ROWS[:2], "test": ROWS[2:]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved", split="train") == ROWS[:2]
    [(where, row)] = read(Source(f"{tmp_path}/saved", "", "test"))
    assert row == ROWS[2] and where == f"{tmp_path}/saved (test), row 1"
    assert "data.split = 'dev': data.path = " in refusal(tmp_path / "saved", split="dev")


def test_a_damaged_saved_dataset_is_named(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"nonsense")
    assert "saved' cannot be read as a saved dataset (" in refusal(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["saved", "p.arrow"])
def test_arrow_files_that_point_elsewhere_are_refused(tmp_path, kind):
    """Reading where this one points would end the process."""
    datasets.Dataset.from_dict({"prompt": ["abcd", "efgh"]}).save_to_disk(tmp_path / "saved")
    [file] = (tmp_path / "saved").glob("*.arrow")
    sound, far = struct.pack("<iii", 0, 4, 8), struct.pack("<iii", 0, 2**30, 2**31 - 1)
    assert sound in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(sound, far))
    if kind != "saved":
        file.rename(tmp_path / kind)
    message = refusal(tmp_path / kind)
    assert "cannot be read as" in message and "offset" in message.lower()


def test_a_json_file_of_lines_or_of_one_object(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("\ufeff" + json.dumps(ROWS[1], indent=1))
    assert list(read(Source(str(path)))) == [(f"{path}, row 1", ROWS[1])]
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(read(Source(str(path))))[2] == (f"{path}, line 3", ROWS[2])
    path.write_text('[{"prompt": "a"}, 3]')
    assert f"{path}, row 2 is a int, not a JSON object: 3" in refusal(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_folder_of_files_named_by_split(tmp_path, suffix):
    write(tmp_path / f"my_train{suffix}", ROWS[:2])
    test = write(tmp_path / f"my_test{suffix}", ROWS[2:])
    write(tmp_path / f"notes{suffix}", [{"other": 1}])
    assert rows_of(tmp_path, split="train") == ROWS[:2]
    [(where, row)] = read(Source(str(tmp_path), "", "test"))
    assert row == ROWS[2] and where.startswith(f"{test}, ")
    assert has_splits(str(tmp_path))
    assert rows_of(tmp_path, "main", "train") == ROWS[:2]  # it names no configurations


def test_a_split_of_several_files(tmp_path):
    for i, row in enumerate(ROWS):
        write(tmp_path / "data" / f"train-0000{i}-of-00003.parquet", [row])
    found = list(read(Source(str(tmp_path), "", "train")))
    assert [row for _, row in found] == ROWS
    assert found[1][0] == f"{tmp_path}/data/train-00001-of-00003.parquet, row 1"


def test_a_broken_line_in_a_folder_is_named(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS)
    path.write_text(path.read_text() + '{"prompt": "cut')
    assert f"data.path: {path}, line 4 is not JSON" in refusal(tmp_path, split="train")


def test_an_unknown_split_is_named_with_those_there_are(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS)
    options = ("data.eval_path", "data.eval_name", "data.eval_split")
    message = refusal(tmp_path, split="valid", options=options)
    assert f"data.eval_split = 'valid': data.eval_path = '{tmp_path}' has the splits" in message
    assert "train, test. Set data.eval_split to one of them." in message
    assert "data.split = ''" in refusal(tmp_path)


def test_the_only_split_needs_no_name(tmp_path):
    write(tmp_path / "test.jsonl", ROWS)
    assert rows_of(tmp_path) == ROWS
    assert "data.split = 'train'" in refusal(tmp_path, split="train")


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty", split="train")
    assert all(word in message for word in ["data.path = ", "empty'", "train.jsonl"])


CONFIGURATIONS = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train*
  - split: test
    path: main/test*
- config_name: other
  data_files: other/*.jsonl
---
"""


def clone_of_a_hub_dataset(folder: Path) -> Path:
    write(folder / "main" / "train.jsonl", ROWS[:2])
    write(folder / "main" / "test.jsonl", ROWS[2:])
    write(folder / "other" / "train.jsonl", [{"prompt": "other"}])
    (folder / "README.md").write_text(CONFIGURATIONS)
    return folder


def test_configurations_of_a_folder(tmp_path):
    folder = clone_of_a_hub_dataset(tmp_path / "clone")
    assert rows_of(folder, "main", "test") == ROWS[2:]
    assert rows_of(folder, "other", "train") == [{"prompt": "other"}]
    for name in ("", "mian"):
        message = refusal(folder, name, "train")
        assert f"data.name = {name!r}: data.path" in message
        assert "'main', 'other'. Set data.name" in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k(shared, split):
    found = list(read(Source(str(shared / "data" / "gsm8k"), "", split)))
    assert len(found) == {"train": 7473, "test": 1319}[split]
    assert found[-1][0].endswith(f"{split}.jsonl, line {len(found)}")
    assert all(row.keys() == {"question", "answer"} for _, row in found)


# --- The hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, cache):
    """A dataset "own/maths" as the cache of `datasets` holds one that was downloaded before."""
    clone = clone_of_a_hub_dataset(tmp_path / "clone")
    datasets.load_dataset(str(clone), "main")
    shutil.rmtree(clone)
    [made] = (cache / "clone" / "main" / "0.0.0").glob("*/")
    kept = cache / "own___maths" / "main" / "0.0.0" / made.name
    shutil.copytree(made, kept)
    for file in kept.glob("clone-*"):
        file.rename(file.with_name(file.name.replace("clone-", "maths-")))
    return "own/maths"


def test_a_hub_dataset(hub):
    assert rows_of(hub, "main", "train") == ROWS[:2]
    [(where, row)] = read(Source(hub, "main", "test"))
    assert where == "own/maths (test), row 1" and row == ROWS[2]
    assert rows_of(hub, "main", "train[:1]+test") == [ROWS[0], ROWS[2]]
    assert has_splits(hub)


def test_pictures_of_a_hub_dataset_are_not_opened(hub, monkeypatch):
    picture = {"bytes": None, "path": "/etc/hostname"}
    features = datasets.Features(prompt=datasets.Value("string"), picture=datasets.Image())
    row = {"prompt": "hi", "picture": picture}
    made = datasets.Dataset.from_list([row], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: made)
    assert rows_of(hub, "main", "train") == [row]


def test_a_hub_datasets_splits_and_configurations_are_named(hub):
    message = refusal(hub, "main", "valid")
    assert "data.split = 'valid': data.path = 'own/maths' has the splits train, test." in message
    assert "data.name = 'mian'" in refusal(hub, "mian", "train")
    assert "data.split = 'train[:x]' cannot be read" in refusal(hub, "main", "train[:x]")


def test_a_hub_dataset_out_of_reach():
    message = refusal("no-such-owner/no-such-data", split="train")
    for word in ["data.path = 'no-such-owner/no-such-data'", "spelling", "hf auth login"]:
        assert word in message


@pytest.mark.parametrize("path", ["gone.jsonl", "tests/gone", "/gone/x", "a b", "http://x/y"])
def test_what_looks_like_no_hub_id_is_not_asked_for(path, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    message = refusal(path)
    words = [f"data.path = {path!r}: there is no such file or folder", "not look like a hub id"]
    assert all(word in message for word in words)


def test_a_file_of_a_name_like_it_is_told(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "notes.md"):
        (tmp_path / name).write_text("{}")
    message = refusal(str(tmp_path / "trian.jsonl"))
    assert f"Did you mean {tmp_path / 'train.jsonl'}" in message and "notes" not in message
    assert "Did you mean" not in refusal(str(tmp_path / "gone.jsonl"))
