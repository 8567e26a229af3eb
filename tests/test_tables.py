"""Tables of notebooks say what the CSV says, in HTML and in plain text; the best is marked without colour or style."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from kdlib.analysis import report, tables
from kdlib.errors import KdlibError

FRAME = pd.DataFrame(
    {
        "cell": ["b, <c> & d", "a", "unknown", "e"],
        "nll": [5.0, 4.123456789, np.nan, 4.25],
        "tokens": [12_345_678, 999, 10, 20],
        "low": [-0.5, 0.1, np.nan, 0.2],
    }
)
COLUMNS = {"Student": "{cell}", "NLL": "{nll:.3f}", "Tokens": "{tokens:si}", "From": "[{low:+.1f}]"}


class Cells(HTMLParser):
    """Reads a table's rows, and which cells are bold, with a parser of its own."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.bold, self.sides = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
            self.bold.append(0)
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.sides.append(dict(attributes)["align"])
        elif tag == "b":
            self.bold[-1] += 1

    def handle_data(self, data):
        if data.strip():
            self.rows[-1][-1] += data


def test_rows_are_sorted_by_the_best_and_the_missing_come_last():
    found = Cells(tables.show(FRAME, COLUMNS, best="nll")._repr_html_())
    assert found.rows == [
        ["Student", "NLL (nats/token)", "Tokens", "From"],
        ["★ a", "4.123", "999", "[+0.1]"],
        ["e", "4.250", "20", "[+0.2]"],
        ["b, <c> & d", "5.000", "12.3 M", "[-0.5]"],
        ["unknown", "–", "10", "–"],
    ]
    assert found.bold == [0, 4, 0, 0, 0]
    assert found.sides[:4] == ["left", "right", "right", "right"]


def test_the_highest_may_be_the_best_and_ties_share_the_mark():
    frame = FRAME.assign(tokens=[7, 9, 9, 1])
    found = tables.show(frame, COLUMNS, best="tokens", lowest=False)
    assert [row[0] for row in found.body] == ["★ a", "★ unknown", "b, <c> & d", "e"]


def test_without_a_best_rows_stay_and_none_is_marked():
    found = tables.show(FRAME, COLUMNS)
    assert [row[0] for row in found.body] == list(FRAME.cell)
    assert tables.BEST not in repr(found) and "<b>" not in found._repr_html_()


def test_a_frame_without_a_single_value_marks_none():
    found = tables.show(FRAME.assign(nll=np.nan), COLUMNS, best="nll")
    assert not any(found.best)


def test_plain_text_says_the_same_as_the_page_in_columns_that_line_up():
    found = tables.show(FRAME, COLUMNS, best="nll")
    names, units, rule, *lines = repr(found).splitlines()
    headings, *page = Cells(found._repr_html_()).rows
    assert [re.split(" {2,}", line.strip()) for line in lines] == page
    assert names.split() == [heading.split()[0] for heading in headings] and units.split() == ["(nats/token)"]
    assert set(rule) == {"─", " "} and units.rindex(")") == lines[0].index("4.123") + 4, "a heading ends where its numbers do"
    assert len({line.rindex("]") for line in lines if "]" in line}) == 1, "numbers end in one column"


def test_numbers_are_rounded_from_what_the_file_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    frame = pd.DataFrame({"x": [1.00499999, 0.3], "n": [10**9, 7]})  # 1.005 in the file, 1.01 in the paper
    report.save_table(frame, "smoke", "one")
    columns = {"X": "{x:.2f}", "N": "{n:,}"}
    assert tables.show(frame, columns).body == report.Table("one", columns).body("smoke")


def test_long_words_are_wrapped_and_no_word_is_lost():
    text = "a student with a name that is far too long for one line of a table " * 2
    found = repr(tables.show(pd.DataFrame({"cell": [text, "b"], "nll": [1.0, 2.0]}), {"Student": "{cell}", "NLL": "{nll}"}))
    assert max(map(len, found.splitlines())) < 60
    words = re.sub(r"[\d.─]+", " ", found).split()
    assert [word for word in words if word in text.split()] == text.split() and words[-1] == "b"


def test_an_empty_table_has_its_headings():
    found = tables.show(FRAME[:0], COLUMNS, best="nll")
    assert Cells(found._repr_html_()).rows == [["Student", "NLL (nats/token)", "Tokens", "From"]]
    assert repr(found).split() == ["Student", "NLL", "Tokens", "From", "(nats/token)", *repr(found).split()[5:]]


@pytest.mark.parametrize(("columns", "best"), [({"X": "{speed}"}, None), (COLUMNS, "speed")])
def test_a_column_that_is_not_there_is_named(columns, best):
    with pytest.raises(KdlibError, match="columns of its frame, cell, nll, tokens, low; got speed"):
        tables.show(FRAME, columns, best)


def test_the_frame_is_left_as_it_is():
    before = FRAME.copy()
    tables.show(FRAME, COLUMNS, best="nll")
    pd.testing.assert_frame_equal(FRAME, before)


def test_an_evaluation_is_shown_text_by_text_whatever_the_order_of_its_metrics():
    one = {"nll": 5.0, "perplexity": 148.41, "bits_per_byte": 2.5, "accuracy": 0.125, "ece": 0.02, "nll_calibrated": 4.9}
    found = tables.evaluation({"validation": one, "ood": one | {"nll": 6.0}, "test": one})
    assert [row[:2] for row in found.body] == [["test", "5.000"], ["out of domain", "6.000"], ["validation", "5.000"]]
    assert found.headings[1] == "NLL (nats/token)" and found.body[0][2:] == ["148.4", "2.500", "12.5%", "0.020", "4.900"]


def test_facts_are_shown_as_they_are_written():
    found = tables.facts({"Tokens": "1,000", "Kept": "in <two> files"})
    assert Cells(found._repr_html_()).rows == [["What", "Value"], ["Tokens", "1,000"], ["Kept", "in <two> files"]]
