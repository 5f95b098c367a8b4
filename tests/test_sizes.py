"""How much data there is: counted once, known afterwards, and never from another world."""

import json

from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.lab import recipes, world
from prefdyn.lab.sizes import Sizes, sizes

SPEC = plan.data_spec(check({"profile": "smoke"}), 3)


def test_sizes_are_those_of_the_data_and_are_read_the_next_time(tmp_path, monkeypatch):
    known = recipes.dataset(SPEC)
    expected = Sizes(len(known.pairs), len(known.demonstrations), len(known.prompts["train"]))
    assert sizes(SPEC, tmp_path) == expected and min(expected) > 0
    (file,) = (tmp_path / "sizes").iterdir()
    file.write_text(json.dumps(expected._replace(pairs=7)._asdict()))
    sizes.cache_clear()
    monkeypatch.setattr(recipes, "dataset", None)  # nothing is made again
    assert sizes(SPEC, tmp_path).pairs == 7


def test_a_damaged_file_is_counted_again(tmp_path):
    (tmp_path / "a").mkdir()
    first = sizes(SPEC, tmp_path / "a")
    (file,) = (tmp_path / "a" / "sizes").iterdir()
    for text in ("", "{}", '{"pairs": 1, "more": 2}', "[]"):
        file.write_text(text)
        sizes.cache_clear()
        assert sizes(SPEC, tmp_path / "a") == first
        assert json.loads(file.read_text()) == first._asdict()


def test_a_world_that_is_not_as_it_is_written_is_neither_kept_nor_read(tmp_path, monkeypatch):
    sizes(SPEC, tmp_path)
    (file,) = (tmp_path / "sizes").iterdir()
    before = file.read_text()
    file.write_text(before.replace("{", '{"wrong": 1, '))
    monkeypatch.setattr(world, "TRIES", world.TRIES + 1)
    sizes.cache_clear()
    assert sizes(SPEC, tmp_path)._asdict() == json.loads(before)
    assert "wrong" in file.read_text()
    sizes.cache_clear()


def test_without_a_place_to_write_sizes_are_known_all_the_same(tmp_path):
    sizes.cache_clear()
    assert sizes(SPEC, tmp_path / "store").pairs == len(recipes.dataset(SPEC).pairs)
    assert not (tmp_path / "store").exists()  # planning makes no store
    (tmp_path / "sizes").write_text("a file where the folder should be")
    assert sizes(SPEC, tmp_path).pairs == len(recipes.dataset(SPEC).pairs)
