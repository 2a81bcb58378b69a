import gc
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmim.data.decoder import Decoder
from fastmim.data.index import build_index
from fastmim.data.loader import Loader, load_images
from fastmim.data.schedule import Schedule
from fastmim.errors import DataError, TrainingAborted

CPU = torch.device("cpu")


def make_loader(index, config, micro_batch=4, accumulation=1, rank=0, world_size=1, **options):
    options = {"seed": 5, "device": CPU, "threads": 1, **options}
    return Loader(
        index,
        config,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        **options,
    )


def take(loader, count):
    batches = iter(loader)
    taken = [next(batches) for _ in range(count)]
    loader.close()
    return taken


def assert_same(ours, theirs):
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.epochs, theirs.epochs) and torch.equal(ours.positions, theirs.positions)
    np.testing.assert_array_equal(ours.samples, theirs.samples)


def joined(batches, name):
    return torch.cat([torch.as_tensor(getattr(batch, name)) for batch in batches])


@pytest.fixture
def index(make_folder, configure):
    return build_index(str(make_folder(11)), configure(), progress=False)


def test_batches_are_uint8_on_the_device(index, configure):
    (batch,) = take(make_loader(index, configure(image_size=(32, 48))), 1)
    assert batch.images.shape == (4, 32, 48, 3) and batch.images.dtype == torch.uint8
    assert batch.epochs.dtype == batch.positions.dtype == torch.int64
    assert batch.samples.dtype == np.int64 and batch.images.device == CPU


def test_an_epoch_shows_every_image_once(index, configure):
    batches = take(make_loader(index, configure()), 6)
    samples, epochs = joined(batches, "samples"), joined(batches, "epochs")
    for epoch in (0, 1):
        assert sorted(samples[epochs == epoch].tolist()) == list(range(11))
    assert joined(batches, "positions").tolist() == [*range(11), *range(11), *range(2)]


@pytest.mark.parametrize(
    "world_size, micro_batch, accumulation", [(1, 4, 3), (2, 6, 1), (2, 3, 2), (3, 4, 1)]
)
def test_any_number_of_ranks_sees_the_same_stream(index, configure, world_size, micro_batch, accumulation):
    (whole,) = take(make_loader(index, configure(), micro_batch=12), 1)
    parts = [
        take(make_loader(index, configure(), micro_batch, accumulation, rank, world_size), accumulation)
        for rank in range(world_size)
    ]
    in_order = [parts[rank][step] for step in range(accumulation) for rank in range(world_size)]
    for name in ("images", "epochs", "positions", "samples"):
        assert torch.equal(joined(in_order, name), torch.as_tensor(getattr(whole, name)))


def test_repeats_stand_side_by_side_at_positions_of_their_own(index, configure):
    plain = take(make_loader(index, configure(), micro_batch=2), 3)
    repeated = take(make_loader(index, configure(), micro_batch=6, repeats=3), 3)
    for once, often in zip(plain, repeated, strict=True):
        assert torch.equal(often.images.view(2, 3, *once.images.shape[1:]).unbind(1)[2], once.images)
        assert torch.equal(often.images[0], often.images[1]) and torch.equal(often.images[3], often.images[5])
        np.testing.assert_array_equal(often.samples, once.samples)
        assert often.positions.tolist() == [3 * p + r for p in once.positions.tolist() for r in range(3)]
        assert torch.equal(often.epochs, once.epochs.repeat_interleave(3))
    # Two ranks see the stream of one.
    parts = [take(make_loader(index, configure(), 6, 1, rank, 2, repeats=3), 1)[0] for rank in (0, 1)]
    assert torch.equal(joined(parts, "images"), joined(repeated[:2], "images"))
    assert torch.equal(joined(parts, "positions"), joined(repeated[:2], "positions"))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("color_jitter", [None, {"brightness": 0.5, "hue": 0.2}])
def test_repeats_may_be_crops_of_their_own(suffix, color_jitter, make_folder, configure):
    config = configure(color_jitter=color_jitter, scale=(0.1, 0.6))
    index = build_index(str(make_folder(5, suffixes=(suffix,))), config, progress=False)
    batches = take(make_loader(index, config, micro_batch=6, repeats=3, repeat_crops=True), 3)
    schedule = Schedule(index.heights, index.widths, 5, config)
    for batch in batches:
        assert batch.images.shape == (6, *config.image_size, 3) and batch.images.is_contiguous()
        samples = np.repeat(batch.samples, 3)
        plan = schedule.plan_of(batch.epochs.numpy(), batch.positions.numpy(), samples)
        decoder = Decoder(index, config, CPU, batch_size=6, threads=1)
        decoder.start(plan)
        difference = (decoder.result().float() - batch.images.float()).abs()
        # A JPEG's chroma is interpolated across the edge of what is decoded.
        assert difference.max() == 0 if suffix == "png" else difference.mean() < 0.2
        assert not torch.equal(batch.images[0], batch.images[1])


def test_crops_of_an_image_are_replaced_together(configure, make_folder):
    folder = make_folder(5)
    config = configure(max_bad_fraction=0.5)
    index = build_index(str(folder), config, progress=False)
    bad = sorted(folder.iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:200])
    batches = take(make_loader(index, config, micro_batch=4, repeats=2, repeat_crops=True), 5)
    assert 2 not in joined(batches, "samples").tolist() and joined(batches, "images").shape[0] == 20


def test_a_start_step_gives_the_batches_of_a_longer_run(index, configure):
    config = configure(color_jitter={"hue": 0.1})
    whole = take(make_loader(index, config, accumulation=2), 10)
    for ours, theirs in zip(
        take(make_loader(index, config, accumulation=2, start_step=3), 4), whole[6:], strict=True
    ):
        assert_same(ours, theirs)


def test_another_seed_gives_another_order(index, configure):
    (a,), (b,) = (take(make_loader(index, configure(), 11, seed=seed), 1) for seed in (0, 1))
    assert not np.array_equal(a.samples, b.samples)


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_prefetch_and_threads_change_nothing(index, configure, prefetch):
    reference = take(make_loader(index, configure()), 5)
    for ours, theirs in zip(
        take(make_loader(index, configure(prefetch=prefetch), threads=2), 5), reference, strict=True
    ):
        assert_same(ours, theirs)


def test_batches_stay_valid_while_decoding_goes_on(index, configure):
    loader = make_loader(index, configure())
    batches = iter(loader)
    first = next(batches)
    kept = first.images.clone()
    for _ in range(10):
        next(batches)
    loader.close()
    del loader, batches
    gc.collect()
    assert torch.equal(first.images, kept)


@pytest.fixture
def damaged(make_folder, configure):
    """40 images, of which two are ruined after the scan; the same set whole, and the ruined rows."""

    def make(config, ruined=(3, 17)):
        whole, broken = (make_folder(40, name, suffixes=("png",)) for name in ("whole", "broken"))
        indices = [build_index(str(folder), config, progress=False) for folder in (whole, broken)]
        for row in ruined:
            path = broken / f"{row:03}.png"
            data = path.read_bytes()
            path.write_bytes(data[:60] + b"\0" * (len(data) - 80) + data[-20:])
        return *indices, list(ruined)

    return make


def test_a_bad_image_is_named_and_replaced_and_nothing_else_changes(damaged, configure, caplog):
    config = configure(max_bad_fraction=0.1)
    whole, broken, ruined = damaged(config)
    loader = make_loader(broken, config)
    with caplog.at_level(logging.WARNING, "fastmim"):
        ours = take(loader, 20)
    theirs = take(make_loader(whole, config), 20)
    assert sorted(loader.bad) == ruined
    for row in ruined:
        assert sum(broken.name(row) in message for message in caplog.messages) == 1
    wanted, got = joined(theirs, "samples"), joined(ours, "samples")
    hit = torch.isin(wanted, torch.tensor(ruined))
    assert hit.sum() == 2 * len(ruined) and not torch.isin(got, torch.tensor(ruined)).any()
    assert torch.equal(got[~hit], wanted[~hit])
    assert torch.equal(joined(ours, "images")[~hit], joined(theirs, "images")[~hit])
    assert torch.equal(joined(ours, "positions"), joined(theirs, "positions"))


def test_substitutes_do_not_depend_on_what_was_seen_before(damaged, configure):
    config = configure(max_bad_fraction=0.1)
    _, broken, _ = damaged(config)
    whole_run = take(make_loader(broken, config), 20)
    for ours, theirs in zip(take(make_loader(broken, config, start_step=11), 9), whole_run[11:], strict=True):
        assert_same(ours, theirs)
    two = [take(make_loader(broken, config, 2, rank=rank, world_size=2), 20) for rank in range(2)]
    pairs = [batch for pair in zip(*two, strict=True) for batch in pair]
    assert torch.equal(joined(pairs, "images"), joined(whole_run, "images"))


def test_a_truncated_jpeg_is_used_only_where_its_window_is_whole(tmp_path, photo, configure):
    config = configure(max_bad_fraction=0.9, scale=(0.1, 0.2))
    paths = [tmp_path / f"{i}.jpg" for i in range(3)]
    for i, path in enumerate(paths):
        photo(160, 200, seed=i).save(path)
    index = build_index(str(tmp_path), config, progress=False)
    data = paths[1].read_bytes()
    paths[1].write_bytes(data[: len(data) * 2 // 3])
    loader = make_loader(index, config)
    run = take(loader, 20)
    assert loader.bad == {1: "damaged or truncated pixels"}
    assert (joined(run, "samples") == 1).sum() > 0
    for ours, theirs in zip(take(make_loader(index, config, start_step=9), 11), run[9:], strict=True):
        assert_same(ours, theirs)


def test_a_file_emptied_after_the_scan_is_bad_too(index, configure):
    config = configure(max_bad_fraction=0.1)
    (gone,) = [i for i in range(len(index)) if index.name(i).endswith("004.jpg")]
    Path(index.name(gone)).write_bytes(b"")
    loader = make_loader(index, config)
    take(loader, 6)
    assert list(loader.bad) == [gone] and "004.jpg" in loader.bad[gone]


def test_too_many_bad_images_abort_with_their_names(damaged, configure):
    config = configure(max_bad_fraction=0.03)  # one of 40 images
    _, broken, ruined = damaged(config)
    loader = make_loader(broken, config)
    with pytest.raises(
        TrainingAborted, match="2 of 40 images cannot be decoded; expected at most 1"
    ) as error:
        take(loader, 20)
    for row in ruined:
        assert broken.name(row) in str(error.value)


def test_a_rank_that_has_no_further_batches_goes_on_with_its_last(index, configure):
    loader = make_loader(index, configure(), ends_with_ranks=True)
    batches = iter(loader)
    good = [next(batches) for _ in range(3)]
    assert loader.failed is None
    for row in range(len(index)):
        Path(index.name(row)).unlink()
    while loader.failed is None:
        good.append(next(batches))
    last = next(batches)
    assert_same(last, good[-1])
    assert "images cannot be decoded; expected at most 1" in str(loader.failed)
    loader.close()


def test_a_set_without_a_good_image_aborts(damaged, configure):
    config = configure(max_bad_fraction=0.99)
    _, broken, _ = damaged(config, ruined=range(40))
    with pytest.raises(TrainingAborted, match="of 40 images cannot be decoded"):
        take(make_loader(broken, config), 1)


def test_load_images_names_a_bad_one(damaged, configure):
    config = configure()
    _, broken, ruined = damaged(config)
    with pytest.raises(DataError, match=f"{ruined[0]:03}.png cannot be decoded"):
        load_images(broken, config, 10)


def test_load_images_leaves_bad_ones_out_where_asked(damaged, configure, caplog):
    config = configure(max_bad_fraction=0.05)
    whole, broken, ruined = damaged(config)
    with caplog.at_level(logging.WARNING, logger="fastmim"):
        got = load_images(broken, config, 40, skip_bad=True)
    kept = [row for row in range(40) if row not in ruined]
    assert torch.equal(got, load_images(whole, config, 40)[kept])
    assert all(f"{row:03}.png cannot be decoded" in caplog.text for row in ruined)
    with pytest.raises(DataError, match="expected at most 1 such images of 40"):
        load_images(broken, configure(max_bad_fraction=0.04), 40, skip_bad=True)


@pytest.mark.gpu
@pytest.mark.parametrize("jitter", [None, {"hue": 0.1}])
def test_the_gpu_decodes_what_the_cpu_does(index, configure, jitter):
    config = configure(color_jitter=jitter)
    theirs = take(make_loader(index, config), 6)
    ours = take(make_loader(index, config, device=torch.device("cuda")), 6)
    for gpu, cpu in zip(ours, theirs, strict=True):
        assert gpu.images.is_cuda and gpu.epochs.is_cuda and gpu.positions.is_cuda
        np.testing.assert_array_equal(gpu.samples, cpu.samples)
        assert (gpu.images.cpu().int() - cpu.images.int()).abs().double().mean() < 2


@pytest.mark.gpu
def test_the_gpu_is_not_told_to_leave_windows_to_the_cpu(index, configure, capfd):
    take(make_loader(index, configure(), device=torch.device("cuda")), 2)
    assert "fancy upsampling" not in "".join(capfd.readouterr())


@pytest.mark.gpu
def test_a_gpu_batch_is_kept_until_its_work_is_done(index, configure):
    """Work still queued on the batch when Python lets go of it must read the batch's own pixels."""
    expected = [batch.images.double().sum() for batch in take(make_loader(index, configure()), 20)]
    loader = make_loader(index, configure(), device=torch.device("cuda"))
    batches, sums = iter(loader), []
    for _ in range(20):
        images = next(batches).images
        torch.cuda._sleep(10_000_000)
        sums.append(images.double().sum())
        del images
    loader.close()
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack(expected), rtol=0.01, atol=0)


@pytest.mark.gpu
def test_a_bad_image_is_replaced_on_the_gpu_too(damaged, configure):
    config = configure(max_bad_fraction=0.1)
    _, broken, ruined = damaged(config)
    loader = make_loader(broken, config, device=torch.device("cuda"))
    batches = take(loader, 20)
    assert sorted(loader.bad) == ruined and not np.isin(joined(batches, "samples"), ruined).any()
