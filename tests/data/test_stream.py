"""The content of every batch is a pure function. Threads, workers, restarts and bad samples do not change it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, photo, photos, tar_bytes

from hyperprior.config import Config, load_config
from hyperprior.data import patches, splits, stream
from hyperprior.data.lanes import ALL, Cursor
from hyperprior.data.splits import Split
from hyperprior.data.stream import Batch
from hyperprior.errors import DataError


def settings(*overrides: str) -> Config:
    return load_config(
        None, ["data.patch_size=64", "data.eval_crop=64", "data.val_split=0", "data.test_split=0", *overrides]
    )


def read(config: Config, count: int, own: range = range(4), cursors: list[Cursor] | None = None) -> list[Batch]:
    source = splits.open_splits(config.data, 4, count=False).train
    batches = stream.batches(source, config.data, config.seed, own, 4, cursors or [Cursor()] * 4)
    first_batches = [next(batches) for _ in range(count)]
    batches.close()
    return first_batches


def same(a: Batch, b: Batch) -> bool:
    return a.keys == b.keys and a.cursors == b.cursors and np.array_equal(a.images, b.images)


AUGMENTED = ("data.min_scale=0.5", "data.flip=true")


@pytest.mark.parametrize("patches", [1, 3])
def test_a_stream_continues_from_the_cursors_of_any_batch(nested_tar: Path, patches: int) -> None:
    config = settings(f"data.train=[{nested_tar}]", f"data.patches_per_image={patches}", *AUGMENTED)
    straight = read(config, 30)
    for at in (0, 3, 13, 25):
        again = read(config, 4, cursors=straight[at].cursors)
        assert all(same(a, b) for a, b in zip(again, straight[at + 1 :]))


@pytest.mark.parametrize("workers", [2, 4])
def test_several_workers_together_see_the_batches_of_one_worker(nested_tar: Path, workers: int) -> None:
    config = settings(f"data.train=[{nested_tar}]", "data.patches_per_image=2", *AUGMENTED)
    one = read(config, 20)
    each = 4 // workers
    parts = [read(config, 20, own=range(w * each, (w + 1) * each)) for w in range(workers)]
    for t, batch in enumerate(one):
        assert batch.keys == [key for part in parts for key in part[t].keys]
        assert np.array_equal(batch.images, np.concatenate([part[t].images for part in parts]))


def test_the_number_of_threads_does_not_change_the_batches(flat_tar: Path) -> None:
    one = read(settings(f"data.train=[{flat_tar}]", "data.decode_threads=1"), 15)
    many = read(settings(f"data.train=[{flat_tar}]", "data.decode_threads=7"), 15)
    assert all(same(a, b) for a, b in zip(one, many))


def test_another_seed_gives_another_batch(flat_tar: Path) -> None:
    assert not same(
        read(settings(f"data.train=[{flat_tar}]"), 1)[0], read(settings(f"data.train=[{flat_tar}]", "seed=1"), 1)[0]
    )


def test_an_image_is_cut_at_another_place_in_each_epoch(flat_tar: Path) -> None:
    batches = read(settings(f"data.train=[{flat_tar}]"), 18)  # three epochs of 24 images
    cut: dict[str, set[bytes]] = {}
    for batch in batches:
        for key, image in zip(batch.keys, batch.images):
            cut.setdefault(key, set()).add(image.tobytes())
    # Three of 17 x 33 positions are rarely equal, so nearly every image has at least two different patches.
    assert sum(len(patches) >= 2 for patches in cut.values()) > 20


def test_half_of_the_patches_are_mirrored_and_the_others_do_not_change(flat_tar: Path) -> None:
    plain = read(settings(f"data.train=[{flat_tar}]"), 18)
    flipped = read(settings(f"data.train=[{flat_tar}]", "data.flip=true"), 18)
    mirrored: dict[str, list[bool]] = {}
    for a, b in zip(plain, flipped):
        assert a.keys == b.keys
        for key, image, other in zip(a.keys, a.images, b.images):
            assert np.array_equal(image, other) or np.array_equal(image[:, ::-1], other)
            mirrored.setdefault(key, []).append(not np.array_equal(image, other))
    assert 20 < sum(map(sum, mirrored.values())) < 52  # of 72
    assert any(0 < sum(times) < 3 for times in mirrored.values())  # an image may be mirrored in some epochs only


def test_scales_are_drawn_for_each_patch(flat_tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[patches.Place] = []
    draw = patches.draw_place
    monkeypatch.setattr(patches, "draw_place", lambda *a: places.append(draw(*a)) or places[-1])
    read(settings(f"data.train=[{flat_tar}]", "data.min_scale=0.5"), 18)
    scales = np.array([place.scale for place in places])
    assert 0.5 <= scales.min() < 0.55 and 0.95 < scales.max() <= 1 and abs(scales.mean() - 0.75) < 0.06


def test_patches_of_an_image_come_from_one_decode(flat_tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    cut = patches.cut_group
    monkeypatch.setattr(patches, "cut_group", lambda data, *a, **k: decoded.extend(data) or cut(data, *a, **k))
    batches = read(settings(f"data.train=[{flat_tar}]", "data.patches_per_image=4", "data.decode_threads=1"), 16)
    assert [b.keys for b in batches[:4]] == [batches[0].keys] * 4
    assert batches[4].keys != batches[3].keys
    assert len({image.tobytes() for b in batches[:4] for image in b.images}) > 12
    assert len(decoded) <= 4 * (4 + 6)  # of 64 patches: what is used, and what is decoded ahead


def test_a_bad_image_is_skipped_in_its_lane_and_shifts_no_other_lane(tmp_path: Path) -> None:
    good = photos(24)
    bad = list(good)
    bad[7] = (bad[7][0], bad[7][1][:300])
    bad[11] = (bad[11][0], encoded(photo(11, 40, 40)))
    streams = []
    for name, members in (("good", good), ("bad", bad)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.tar").write_bytes(tar_bytes(members))
        streams.append(read(settings(f"data.train=[{tmp_path / name / 't.tar'}]"), 6))
    lanes_good, lanes_bad = ([[b.keys[i].split(": ")[1] for b in s] for i in range(4)] for s in streams)
    moved = 0
    for mine, theirs in zip(lanes_good, lanes_bad):
        left = [key for key in mine if key not in ("p007", "p011")]
        assert theirs[: len(left)] == left
        moved += theirs != mine
    assert 1 <= moved <= 2
    skips = {s.name.split(": ")[1]: s for b in streams[1] for s in b.skipped}
    assert skips["p007"].kind == "bad" and "JPEG" in skips["p007"].reason
    assert skips["p011"].kind == "small" and "40x40 is smaller than 64x64" in skips["p011"].reason
    assert sum(b.counts.samples for b in streams[1]) == 24 + sum(len(b.skipped) for b in streams[1])


def test_a_group_of_bad_samples_is_skipped_and_each_is_named(tmp_path: Path) -> None:
    size = 64 * 4  # more than any group
    good = photos(8, "good")
    huge = bytearray(good[0][1])
    frame = huge.index(b"\xff\xc0") + 5
    huge[frame : frame + 4] = b"\xff\xdc\xff\xdc"  # a frame of 65,500 x 65,500, which would take 12 GB
    bad = [(f"bad{i:04d}.jpg", bytes(huge) if i % 2 else good[0][1][:200] + b"\xff\xd9") for i in range(size)]
    png = [("png0.jpg", encoded(photo(1), "PNG"))]  # the content decides, not the name
    (tmp_path / "t.tar").write_bytes(tar_bytes(bad + good[:4] + png + good[4:]))
    batches = read(settings(f"data.train=[{tmp_path / 't.tar'}]", "data.shuffle_buffer=1"), 6)
    skips = {skip.name.split(": ")[1]: skip for batch in batches for skip in batch.skipped}
    assert sorted(skips) == [f"bad{i:04d}" for i in range(size)] and {skip.kind for skip in skips.values()} == {"bad"}
    assert "65500x65500 pixels" in skips["bad0001"].reason and "corrupt" in skips["bad0002"].reason
    keys = {key.split(": ")[1]: image for batch in batches for key, image in zip(batch.keys, batch.images)}
    assert set(keys) == {name.rpartition(".")[0] for name, _ in good} | {"png0"}
    assert sum(batch.counts.bad for batch in batches) >= size


def shards_of_four(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"s{i}.tar" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes(tar_bytes(photos(4, f"s{i}_")))
    return paths


def test_a_shard_that_cannot_be_read_ends_its_visit_and_shifts_no_other_lane(tmp_path: Path) -> None:
    batches_of = {}
    for name in ("good", "bad"):
        paths = shards_of_four(tmp_path / name)
        config = settings(f"data.train=[{', '.join(map(str, paths))}]")
        source = splits.open_splits(config.data, 4, count=False).train
        if name == "bad":  # after open_splits, which would raise an error
            paths[2].write_bytes(paths[2].read_bytes()[:3000])
        batches = stream.batches(source, config.data, 0, range(4), 4, [Cursor()] * 4)
        batches_of[name] = [next(batches) for _ in range(12)]
        batches.close()
        again = stream.batches(source, config.data, 0, range(4), 4, batches_of[name][4].cursors)
        assert all(same(next(again), batch) for batch in batches_of[name][5:])
        again.close()
    first = [[[b.keys[i].split(": ")[1] for b in batches_of[n]][:4] for i in range(4)] for n in ("good", "bad")]
    assert sum(mine != theirs for mine, theirs in zip(*first)) <= 1  # within the first visits
    lost = [skip for batch in batches_of["bad"] for skip in batch.skipped]
    assert lost and {skip.kind for skip in lost} == {"lost"}
    assert all("s2.tar ends at byte" in skip.reason and skip.name.endswith("s2.tar") for skip in lost), lost
    assert not any("s2_" in key for batch in batches_of["bad"] for key in batch.keys)
    # 12 batches of 4 are two epochs of 24.
    assert sum(b.counts.visits for b in batches_of["good"]) == 12
    assert sum(b.counts.samples for b in batches_of["good"]) == 48
    assert sum(b.counts.samples for b in batches_of["bad"]) == 48  # lost samples do not count


def test_late_input_is_reported_with_the_name_of_its_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stream, "LATE", 0.5)
    sources = [f"pipe:sleep 2; cat {path}" for path in shards_of_four(tmp_path / "d")]
    config = settings("data.train=[" + ", ".join(f"'{s}'" for s in sources) + "]", "data.allow_pipe=true")
    source, names = splits.open_splits(config.data, 4, count=False).train, [""]
    prefetch = stream.Prefetch(stream.batches(source, config.data, 0, range(4), 4, [Cursor()] * 4, names.append))
    reports: list[tuple[float, str]] = []
    prefetch.next(late=lambda seconds: reports.append((seconds, names[-1])))
    prefetch.close()
    assert len(reports) >= 3 and reports[0][0] > 0.5 and all(name.startswith(tuple(sources)) for _, name in reports)


def test_a_source_without_usable_images_is_an_error_and_not_an_endless_search(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(tar_bytes([(f"{i}.png", encoded(photo(i, 30, 30), "PNG")) for i in range(8)]))
    with pytest.raises(DataError, match="no usable image in more than an epoch.*30x30"):
        read(settings(f"data.train=[{tmp_path / 't.tar'}]"), 1)


def test_more_lanes_than_images_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(tar_bytes(photos(3)))
    with pytest.raises(DataError, match=r"3 images but train\.batch_size is 4"):
        read(settings(f"data.train=[{tmp_path / 't.tar'}]"), 1)


def test_a_lane_without_samples_in_an_epoch_continues_in_the_next(nested_tar: Path) -> None:
    # 21 images in 6 shards for 16 lanes: the parts of the small shards are often empty.
    config = settings(f"data.train=[{nested_tar}]")
    source = splits.open_splits(config.data, 16, count=False).train
    batches = stream.batches(source, config.data, 0, range(16), 16, [Cursor()] * 16)
    first_batches = [next(batches) for _ in range(20)]
    batches.close()
    assert len({key for batch in first_batches for key in batch.keys}) == 21


def test_a_file_that_cannot_be_read_is_skipped_as_a_bad_image(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for name, data in photos(8):
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "loop").symlink_to(folder)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "far.png").write_bytes(encoded(photo(50), "PNG"))
    (folder / "class").symlink_to(tmp_path / "linked")
    batches = read(settings(f"data.train=[{folder}]"), 12)
    skips = {skip.name.split(": ")[1]: skip for batch in batches for skip in batch.skipped}
    assert set(skips) == {"gone"} and "No such file" in skips["gone"].reason
    assert len({key for batch in batches for key in batch.keys}) == 9  # the linked folder is read, the loop is not


def test_counting_does_not_change_the_fingerprint(nested_tar: Path, flat_tar: Path) -> None:
    config = settings(f"data.train=[{nested_tar}]", f"data.val=[{flat_tar}]")
    fingerprints = {splits.open_splits(config.data, 4, count=count).fingerprint() for count in (False, True)}
    assert len(fingerprints) == 1


def test_waiting_for_input_can_be_given_up() -> None:
    event = threading.Event()

    def items():
        event.wait(30)
        yield 1

    prefetch = stream.Prefetch(items())
    assert prefetch.next(lambda: True) is None
    event.set()
    prefetch.close()


def test_no_key_is_in_two_splits_and_max_images_holds(nested_tar: Path, flat_tar: Path) -> None:
    config = load_config(
        None,
        [f"data.train=[{nested_tar}, {flat_tar}]", "data.val_split=0.2", "data.test_split=0.2", "data.max_images=30"],
    )
    opened = splits.open_splits(config.data, 4, count=False)
    keys_of_splits = [
        [s.key for shard in source.shards for s in shard.samples() if source.keep(s.key)]
        for source in (opened.train, opened.val, opened.test)
    ]
    assert [len(keys) for keys in keys_of_splits] == [opened.train.images, opened.val.images, opened.test.images]
    assert sum(map(len, keys_of_splits)) == 30 == len({key for keys in keys_of_splits for key in keys})


def test_evaluation_counts_every_image_once_over_all_workers(flat_tar: Path) -> None:
    config = settings()
    from hyperprior.data.shards import open_sources

    source = Split(open_sources([str(flat_tar)], "x"), ALL, 24)
    one = [place for batch in stream.eval_batches(source, config.data, range(1), 1) for place in batch]
    assert len(one) == 24 and all(place.weight == 1 for place in one)
    for batch_size, workers in ((5, 1), (8, 2), (16, 4)):
        each = batch_size // workers
        parts = [
            list(stream.eval_batches(source, config.data, range(w * each, (w + 1) * each), batch_size))
            for w in range(workers)
        ]
        assert len({len(part) for part in parts}) == 1  # every worker takes the same number of steps
        merged = [p for step in zip(*parts) for share in step for p in share if p.weight]
        assert len(merged) == 24
        assert all(np.array_equal(a.image, b.image) for a, b in zip(merged, one))


def test_prefetch_gives_the_items_and_then_the_error() -> None:
    def items():
        yield from range(5)
        raise DataError("here")

    prefetch = stream.Prefetch(items())
    assert [prefetch.next() for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="here"):
        prefetch.next()
    prefetch.close()
    assert not prefetch.thread.is_alive()


def test_the_fingerprint_depends_on_the_data_and_not_on_its_folder(tmp_path: Path) -> None:
    fingerprints = []
    for folder, count in (("a", 8), ("b", 8), ("c", 9)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.tar").write_bytes(tar_bytes(photos(count)))
        config = settings(f"data.train=[{tmp_path / folder / 't.tar'}]")
        fingerprints.append(splits.open_splits(config.data, 4, count=False).fingerprint())
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
