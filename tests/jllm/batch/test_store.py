"""The job's folder, on disks and in object stores."""

import errno
import os
import threading

import pytest

from jllm.batch.store import StorageError, Store


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path):
    return Store(
        str(tmp_path / "s") if request.param == "disk" else f"memory:/{tmp_path}"
    )


def test_files_come_back(store):
    assert store.read("a/b") is None
    assert store.names("a") == []
    store.replace("a/b", b"one")
    store.replace("a/b", b"two")
    assert store.read("a/b") == b"two"
    assert store.create("a/c", b"three")
    assert not store.create("a/c", b"four")
    assert store.read("a/c") == b"three"
    assert store.names("a") == ["b", "c"]
    store.remove_folder("a")
    assert store.names("a") == []


def test_one_of_many_creates(store):
    made = []

    def create(i):
        if store.create("claim", str(i).encode()):
            made.append(i)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert store.read("claim") == str(made[0]).encode()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    store = Store(str(tmp_path))
    store.replace("a", b"old")

    def tear():
        with store.writing("a") as file:
            file.write(b"ne")
            raise RuntimeError("torn")

    with pytest.raises(StorageError, match="torn"):
        tear()
    assert store.read("a") == b"old"
    assert store.names("") == ["a"]


def test_without_links_files_are_created_once_too(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    store = Store(str(tmp_path))
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.names("") == ["a"]


def test_errors_name_the_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"file/a/b: Not a directory"):
        Store(str(tmp_path / "file")).replace("a/b", b"x")
