"""MMBench: reading, asking, counting, and the workbook."""

import base64
import json
import xml.etree.ElementTree as ElementTree
import zipfile

import pytest

from xtuner.chat import mmbench
from xtuner.chat.mmbench import letter_of
from xtuner.errors import DataError

OPTIONS = {"A": "a cat", "B": "a dog", "C": "two dogs"}
IMAGE = base64.b64encode(b"picture" * 20).decode()


class Scripted:
    """A session that answers from a list and remembers what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = list(answers), []

    def reset(self):
        pass

    def ask(self, prompt, images):
        (image,) = images
        with open(image, "rb") as file:
            self.asked.append((prompt, file.read()))
        yield self.answers[len(self.asked) - 1]


@pytest.fixture
def tsv(tmp_path):
    lines = [
        "index\tquestion\thint\tA\tB\tC\tanswer\tcategory\tl2-category\timage",
        f"1\tWhat is it?\tnan\ta cat\ta dog\t\tA\tobject\tperception\t{IMAGE}",
        "1000001\tWhat is it?\t\ta dog\ta cat\t\tB\tobject\tperception\t1",
        f"2\t这是什么?\tLook.\ta cat\ta dog\ttwo dogs\tC\tcount\treasoning\t{IMAGE}",
    ]
    file = tmp_path / "mmbench.tsv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_questions_are_asked_and_counted(tsv, tmp_path):
    session = Scripted(["A", "A. a dog", "The answer is C."])
    counts = []
    questions = mmbench.read_tsv(tsv)
    answered = list(mmbench.ask_all(session, questions, progress=counts.append))
    assert session.asked[0] == (
        "What is it?\nA. a cat\nB. a dog\n"
        "Answer with the option's letter from the given choices directly.",
        b"picture" * 20,
    )
    assert session.asked[1][1] == b"picture" * 20  # the image of row 1
    assert session.asked[2][0].startswith("Look.\n这是什么?") and "请直接" in session.asked[2][0]
    assert [each.letter for each in answered] == ["A", "A", "C"] and counts == [1, 2, 3]
    found = mmbench.write(tmp_path / "out", answered)
    assert found["each question"] == pytest.approx(2 / 3)
    assert found["circular"] == 0.5  # the first question is right in one of two orders
    assert (found["ability: perception"], found["ability: reasoning"]) == (0, 1)
    assert json.loads((tmp_path / "out" / "mmbench_result.json").read_text())["accuracy"] == found


def test_the_workbook_is_read_by_another_reader(tsv, tmp_path):
    session = Scripted(["A", "B <&> \x01", "none"])
    questions = mmbench.read_tsv(tsv)
    mmbench.write(tmp_path, list(mmbench.ask_all(session, questions, progress=lambda number: None)))
    with zipfile.ZipFile(tmp_path / "mmbench_result.xlsx") as archive:
        table = list(ElementTree.fromstring(archive.read("xl/sheet1.xml"))[0])
        names = archive.read("xl/workbook.xml").decode()
    rows = [["".join(cell.itertext()) for cell in row] for row in table]
    assert rows[0][:5] == ["index", "question", "A", "B", "C"]
    assert rows[2][5:8] == ["B", "B", "1"] and rows[2][-1] == "B <&> "
    assert 'name="predictions"' in names and 'name="accuracy"' in names


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("A", "A"), ("(B) a dog", "B"), ("**C**", "C"), ("The answer is B.", "B"), ("a cat", "A"),
     ("A or B", "A"), ("It is a bird.", ""), ("D", ""), ("Both B and C", ""), ("", "")],
)  # fmt: skip
def test_the_letter_of_an_answer(answer, letter):
    assert letter_of(answer, OPTIONS) == letter


def test_wrong_file_type_is_reported(tmp_path):
    (tmp_path / "x.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(DataError, match="lacks A, image, index, question"):
        mmbench.read_tsv(tmp_path / "x.tsv")
    with pytest.raises(DataError, match="cannot be read"):
        mmbench.read_tsv(tmp_path / "y.tsv")
