import sys
from types import ModuleType

import pytest
from transformers import PreTrainedTokenizerFast

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.errors import ConfigError
from fusiontree.eval import registry
from fusiontree.eval.registry import Family, check_settings, find_tasks
from fusiontree.eval.task import TaskSettings, TokenText


class Named:
    version, main_metric = 1, "m"

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture(autouse=True)
def families(monkeypatch):
    module = ModuleType("made_up_families")
    module.ONE = Family("one", "alone", lambda _: Named("one"), reads=("limit",), options={"color": "of the sky"})
    module.MANY = Family("many", "three", lambda m: Named(f"many:{m}"), members=("a", "ab", "c"), reads=("lengths",))
    module.OPEN = Family("open", "any name", lambda m: Named(f"open:{m}"), open=True)
    monkeypatch.setitem(sys.modules, "made_up_families", module)
    table = {name.lower(): f"made_up_families:{name}" for name in ("ONE", "MANY", "OPEN")}
    monkeypatch.setattr(registry, "FAMILIES", table)


def test_names_groups_and_patterns_in_the_order_given_each_once():
    assert [task.name for task in find_tasks("many:c", "one", "many", "open:x/y")] == [
        "many:c", "one", "many:a", "many:ab", "open:x/y",
    ]  # fmt: skip
    assert [task.name for task in find_tasks("many:a*")] == ["many:a", "many:ab"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "many[:…], one, open:…"),
        ("many:d", "a, ab, c"),
        ("one:a", "one task"),
        ("open", "open:NAME"),
        ("", "there are"),
    ],
)
def test_a_name_that_means_nothing_says_what_exists(name, said):
    with pytest.raises(ConfigError) as caught:
        find_tasks(name)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_settings_nobody_reads_are_refused():
    check_settings(["one", "many"], TaskSettings(limit=3, lengths=(8,), options={"color": "blue"}, max_length=9))
    with pytest.raises(ConfigError, match="--lengths: none of one"):
        check_settings(["one"], TaskSettings(lengths=(8,)))
    with pytest.raises(ConfigError, match=r"--option colour: .* color \(of the sky\)"):
        check_settings(["one"], TaskSettings(options={"colour": "blue"}))


def test_every_family_that_ships_can_be_listed(monkeypatch):
    monkeypatch.undo()
    for name in registry.FAMILIES:
        group = registry.family(name)
        assert group.name == name and group.about and set(group.reads) <= set(TaskSettings.__dataclass_fields__)
        assert bool(group.members) + group.open <= 1


def test_token_text_counts_what_the_model_sees():
    text = TokenText(byte_tokenizer(), 100)
    assert (text.count("añb"), text.encode("ab"), text.decode([97, 256, 98])) == (4, [97, 98], "ab")
    assert text.chat("hi") == "User: hi\n\nAssistant:"
    assert isinstance(text.tokenizer, PreTrainedTokenizerFast)
    text.tokenizer.chat_template = None
    assert text.chat("hi") == "hi"
