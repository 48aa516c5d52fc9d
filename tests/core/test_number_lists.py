"""Lists of numbers and references: the meaning of each text, and no meaning that was not intended."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from pathlib import Path

import pytest

from easyref_core.unet.layer_weights import parse_layer_weights
from easyref_core.unet.weight_schedule import parse_schedule
from easyref_core.utils.number_lists import parse_numbers, parse_reference_weights, parse_references

SEPARATORS = (", ", ";", "; ", " ", "\n", "\t", " ,", "，", "；", "、", ",\n", " , ; ", "　")
# by text: the numbers, (decimal, list) that a comma may mean, the references, the weights, the errors
CASES = json.loads(Path(__file__).with_name("number_lists.json").read_text(encoding="utf-8"))
NUMBERS = ("0", "1", "-1", "0.5", ".5", "2.", "+3", "1e-1", "-0.25")


@pytest.mark.parametrize("separator", SEPARATORS)
def test_every_separator_separates_every_pair_of_numbers(separator: str) -> None:
    for first, second in itertools.product(NUMBERS, NUMBERS):
        if separator == " ," and second in ("0", "1"):
            continue  # ",1" may be a tenth
        for text in (f"{first}{separator}{second}", f" {first}{separator}{second}{separator}\n"):
            assert parse_numbers(text, "weights") == [float(first), float(second)]


@pytest.mark.parametrize(("text", "numbers"), CASES["numbers"].items())
def test_numbers(text: str, numbers: list[float]) -> None:
    assert parse_numbers(text, "weights") == numbers


@pytest.mark.parametrize(
    ("text", "decimal", "listed"), [(text, *pair) for text, pair in CASES["decimal_commas"].items()]
)
def test_possible_decimal_comma_is_refused(text: str, decimal: str, listed: str) -> None:
    with pytest.raises(ValueError, match=r"^weights has .* may be a decimal comma") as error:
        parse_numbers(text, "weights")
    assert f"as in {decimal}, and separate" in str(error.value)
    assert str(error.value).endswith(f"as in {listed}.")
    assert len(parse_numbers(decimal, "weights")) == 1
    assert len(parse_numbers(listed, "weights")) == listed.count(";") + 1


@pytest.mark.parametrize(
    "text", ["x", "0.5x", "1.2.3", "1_0", "nan", "inf", "1e999", "50%", "1/2", "10x", "2:1", "--1", "²"]
)
def test_not_a_number_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^weights has '.*' where a number is wanted\. Write numbers, as in \"1, 0.5, 0\""
    ):
        parse_numbers(f"1, {text}", "weights")


def test_bounds_are_named() -> None:
    assert parse_numbers("-1, 3", "weights", -1, 3) == [-1, 3]
    with pytest.raises(
        ValueError, match=r"ends has '1.5' where a number is wanted, from 0 to 1\. Write .* \"0.4, 1\""
    ):
        parse_numbers("1, 1.5", "ends", 0, 1, example="0.4, 1")


# References of a group


@pytest.mark.parametrize(("text", "chosen"), CASES["references"].items())
def test_references(text: str, chosen: list[int]) -> None:
    assert parse_references(text, "references", 5, most=1000) == chosen


@pytest.mark.parametrize("text", [*"0 6 1.5 nan inf -1 1- 1-6 1-2-3 0-2 x 1:2 1e9 1-1e9".split(), "9" * 5000])
def test_references_out_of_range(text: str) -> None:
    with pytest.raises(
        ValueError, match="references has '.*no such reference in a group of 5.*ranges such as 1-5, or all"
    ):
        parse_references(f"1, {text}", "references", 5, most=1000)


def test_many_references_are_refused_before_they_are_listed() -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"names 100,000,000 references; wanted at most 1,000"):
        parse_references("all," * 100_000, "references", 1000, most=1000)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("text", "weights"), CASES["reference_weights"].items())
def test_weights_of_references(text: str, weights: list[float]) -> None:
    assert parse_reference_weights(text, "weights", 4) == weights


# Pairs


def test_pairs_are_parsed_alike_everywhere() -> None:
    layers = (0, 0, 0, 1, 0, 0, 0.5, 0, 0, 0, 0)
    for text in ("3:1, 6:0.5", "3:1,6:0.5", "3:1;6:0.5", "3:1 6:0.5", "3 : 1\n6 : 0.5", "３：１，６：０．５"):
        assert parse_layer_weights(text) == layers
    assert parse_layer_weights("3:1,6:1")[6] == 1  # a number cannot span two pairs
    for text in ("0.2:1, 0.8:0", "0.2:1,0.8:0", "0.2:1; 0.8:0", "0.2:1\t0.8:0", "0.2：1、0.8：0"):
        assert parse_schedule(text, 0, 1) == [(0.2, 1), (0.8, 0)]
    assert parse_schedule("0:1,1:0", 0, 1) == [(0, 1), (1, 0)]
    assert parse_schedule("1; 0.5 0", 0, 1) == [(0, 1), (0.5, 0.5), (1, 0)]


PARSERS = {
    "reference_weights": lambda text: parse_reference_weights(text, "weights", 4),
    "layer_weights": parse_layer_weights,
    "schedules": lambda text: parse_schedule(text, 0, 1),
}
INVALID = [(kind, *case) for kind in PARSERS for case in CASES[f"invalid_{kind}"].items()]


@pytest.mark.parametrize(("kind", "text", "message"), INVALID)
def test_invalid_pairs_are_refused(kind: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PARSERS[kind](text)


def test_decimal_comma_is_never_a_separator() -> None:
    """Every list of up to three numbers written with decimal commas and any separator: right, or an error."""
    values = ("0", "1", "0,5", "1,25", "-0,5", ",5")
    for count in (1, 2, 3):
        for written, separator in itertools.product(
            itertools.product(values, repeat=count), (";", "; ", " ", ", ", "，", ",")
        ):
            text = separator.join(written)
            if separator == "," and not any("," in value for value in written):
                continue  # 0,1 is refused as well
            meant = [float(value.replace(",", ".")) for value in written]
            with contextlib.suppress(ValueError):
                assert parse_numbers(text, "weights") == meant, text


@pytest.mark.parametrize("text", [*(sign * 300_000 for sign in " 1:,-"), "1" * 300_000 + "x", "1," * 150_000])
def test_long_texts_take_no_time(text: str) -> None:
    start = time.process_time()
    for parse in (
        lambda: parse_numbers(text, "weights"),
        lambda: parse_references(text, "references", 5, most=1000),
        lambda: parse_schedule(text, 0, 1),
        lambda: parse_layer_weights(text),
    ):
        with contextlib.suppress(ValueError):
            parse()
    assert time.process_time() - start < 5
