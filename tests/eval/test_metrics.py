"""Every metric on cases worked by hand; tests/eval/tasks/test_official_scores.py holds what the official code gives."""

import sys

import pytest

from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.metrics import chinese, leval
from fusiontree.eval.metrics.choices import classification, retrieval, share_of_numbers, stated_letter
from fusiontree.eval.metrics.code import longbench_line, repobench_line, same_code
from fusiontree.eval.metrics.edit import common_length, edit_similarity, edit_similarity_difflib
from fusiontree.eval.metrics.rouge import google_rouge, rouge_l, rouge_l_zh
from fusiontree.eval.metrics.words import normalised, qa_f1, qa_f1_zh


def test_normalised_drops_case_signs_articles_and_blanks():
    assert normalised("  The U.S.  is an  «Apple»; the-theme ") == "us is «apple» thetheme"


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the red apple", "A red apple!", 1.0),
        ("red", "red apple", 2 * (1 / 1) * (1 / 2) / 1.5),  # precision 1, recall 1/2
        ("red red apple", "red apple pie", 2 / 3),  # 2 of 3 and 2 of 3: the second "red" has no partner
        ("green", "red", 0.0),
        ("", "red", 0.0),
        ("the", "the", 0.0),  # nothing is left of either
    ],
)
def test_qa_f1(answer, reference, score):
    assert qa_f1(answer, reference) == pytest.approx(score)


def test_qa_f1_zh_counts_jiebas_words():
    # 我们 | 去 | 北京 | 。 against 我们 | 去 | 上海 | 公园; the full stop goes: 2 of 3, 2 of 4.
    assert qa_f1_zh("我们去北京。", "我们去上海公园") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert qa_f1_zh("北京！", "“北京”") == 1.0
    assert qa_f1_zh("北京", "《北京》") == pytest.approx(2 / 3)  # LongBench's list has 》 and lacks 《


def test_rouge_l_counts_each_word_once_and_keeps_case():
    # Sentences: "The cat sat" and " On the mat!" against one of six words. Common in order: {cat, sat} and {the}; "On"
    # is not "on", "mat!" not "mat". 3 of 6 words of each.
    assert rouge_l("The cat sat. On the mat!", "the cat sat on the mat") == pytest.approx(6 / 11)
    # The reference has 5 different words (two "the"), the answer 6, and 3 are common: 2 · 3/5 · 3/6 / (3/5 + 3/6).
    assert google_rouge("The cat sat. On the mat!", "the cat sat on the mat")["rougeL"] == 1.0


def test_rouge_l_of_nothing_is_nothing():
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("...", "a") == 0.0
    assert rouge_l("a", "a") == pytest.approx(1.0, abs=1e-7)
    assert rouge_l("a", "a") < 1.0  # the package adds 1e-8 to the divisor


def test_rouge_l_takes_the_subsequence_that_the_package_takes():
    # "b a" against "a b": {a} and {b} are both longest. With ties the package walks back along the answer: it finds b.
    assert rouge_l("a b c", "b a c") == pytest.approx(2 / 3)
    # The union over the sentences of the answer has both, 3 of 3.
    assert rouge_l("a b c. b a", "b a c") == pytest.approx(1.0)


def test_a_sentence_too_long_for_the_packages_recursion_has_a_score():
    words = " ".join(f"w{i}" for i in range(1200))
    assert rouge_l(words, words.replace("w0 ", "x ")) == pytest.approx(1199 / 1200)


def test_rouge_l_zh_goes_over_words():
    # 今天天气 | 很 | 好 against 今天天气 | 不错: 1 of 3, 1 of 2.
    assert rouge_l_zh("今天天气很好", "今天天气不错") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_google_rouge():
    scores = google_rouge("the dog bit the man", "The man bit the dog.")
    assert scores["rouge1"] == 1.0
    assert scores["rouge2"] == pytest.approx(3 / 4)  # the-dog, bit-the, the-man; dog-bit is not there
    assert scores["rougeL"] == pytest.approx(3 / 5)  # the bit the
    assert google_rouge("", "a") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_common_length():
    assert common_length("ABCBDAB", "BDCABA") == 4
    assert common_length("", "abc") == common_length("abc", "") == 0
    assert common_length("x" * 200, "x" * 70) == 70


@pytest.mark.parametrize(
    ("answer", "reference", "similarity"),
    [
        ("abcd", "abcd", 100),
        ("", "", 100),
        ("", "a", 0),
        ("ab", "cd", 0),
        ("kitten", "sitting", 62),  # LCS "ittn": 8 of 13
        ("abcde", "abfde", 80),
    ],
)
def test_edit_similarity(answer, reference, similarity):
    assert edit_similarity(answer, reference) == similarity


def test_the_two_backends_of_fuzzywuzzy_differ():
    # A longest common subsequence is "abc", 3 of 8 + 5 characters; difflib starts with the longest block, "zz", and
    # has nothing left on either side of it.
    assert edit_similarity("a1b2c3zz", "zzabc") == round(100 * 2 * 3 / 13)
    assert edit_similarity_difflib("a1b2c3zz", "zzabc") == round(100 * 2 * 2 / 13)
    assert edit_similarity_difflib("", "a") == 0
    assert edit_similarity_difflib("", "") == 100


def test_classification_shares_between_the_classes_named():
    classes = ["animal", "colour", "number"]
    assert classification("colour", "colour", classes) == 1.0
    assert classification("a colour or a number", "colour", classes) == 0.5
    assert classification("an animal", "colour", classes) == 0.0
    assert classification("", "colour", classes) == 0.0


def test_classification_skips_the_name_after_one_it_takes_out():
    # Found: date, birth, date of birth. Taking out "date" moves "birth" into its place, which is then not looked at.
    classes = ["date", "birth", "date of birth"]
    assert classification("date of birth", "date of birth", classes) == 0.5
    assert classification("date of birth", "date of birth", classes, official=False) == 1.0
    assert classification("date", "date of birth", classes, official=False) == 0.0


def test_numbers():
    assert share_of_numbers("Paragraph 3", "3") == 1.0
    assert share_of_numbers("3 or 30 or 3.", "3") == pytest.approx(2 / 3)
    assert share_of_numbers("1.5", "5") == 0.5
    assert share_of_numbers("none", "3") == 0.0
    assert retrieval("It is Paragraph 12, not 2", "Paragraph 12", "Paragraph ") == 0.5
    assert retrieval("段落7", "段落7", "段落") == 1.0
    with pytest.raises(DataError, match="Paragraph NUMBER"):
        retrieval("3", "three", "Paragraph ")


def test_stated_letter():
    assert stated_letter("So: **The correct answer is (B)**.") == "B"
    assert stated_letter("The correct answer is C") == "C"
    # The form with brackets is looked for first, wherever it stands.
    assert stated_letter("The correct answer is A or The correct answer is (D)") == "D"
    assert stated_letter("The answer is (B)") is None
    assert stated_letter("The correct answer is (E)") is None


def test_longbench_line():
    assert longbench_line("\n\n```python\n# so\n// so\nx = 1\ny = 2") == "x = 1"
    assert longbench_line("x = '#'\ny = 2") == "y = 2"
    assert longbench_line("# a\n\nx = 1") == ""  # a blank line is a line
    assert longbench_line("`") == ""


def test_repobench_line():
    assert repobench_line("\n   \n# c\n    x = 1  # d\n") == "    x = 1  # d"
    assert repobench_line('"""a\nb\n"""\nx = 1') == "x = 1"
    assert repobench_line('"""one line"""\nx = 1\n"""\ny = 2') == "y = 2"  # it opened a comment
    assert repobench_line("# a\n# b") == "# a"
    assert repobench_line("/* a\n b */\n// c\nint x;", "java") == "int x;"
    assert repobench_line("# a\nint x;", "java") == "# a"


def test_same_code():
    assert same_code("  x  =  1", "x = 1 ") == 1.0
    assert same_code("x=1", "x = 1") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("A", "A", 1.0),
        ("AB", "ABD", 0.25),  # some of the right ones and no wrong one
        ("AC", "ABD", 0.0),
        ("B", "A", 0.0),
        ("18", "18.0", 1.0),
        ("", "18", 0.0),
        ("it is 018 apples", "18", 1.0),  # no number, so the gold text is looked for
        ("The role of Art in  society.", "the role of art in society", 1.0),
        ("true", "true", 1.0),
        ("<error>", "false", 0.0),
    ],
)
def test_leval_exact(answer, reference, score):
    assert leval.exact(answer, reference) == score


def test_leval_one_letter():
    assert leval.chosen_letter("C. because") == "C"
    assert leval.chosen_letter("Because of that, D") == "B"
    assert leval.chosen_letter("no idea") == "A"
    assert leval.chosen_letter("  ") == "None"
    assert leval.chosen_letter("Because of that, D", official=False) == "D"
    assert leval.chosen_letter("no idea", official=False) == "None"


def test_leval_many_letters():
    assert leval.chosen_letters("DBA") == "ABD"
    assert leval.chosen_letters("A. yes\nC. yes") == "AC"
    assert leval.chosen_letters("I think B) and D) Question A.") == "BD"
    assert leval.chosen_letters("it's {CB}") == "CB"  # the first run of letters, as it stands
    assert leval.chosen_letters("no idea") == "A"
    assert leval.chosen_letters("") == "None"
    assert leval.chosen_letters("Because: A, C", official=False) == "AC"
    assert leval.chosen_letters("no idea", official=False) == "None"


def test_leval_gold_letters():
    assert leval.gold_letters("(B) Their subconscious knew") == "B"
    assert leval.gold_letters("ACD") == "ACD"
    assert leval.gold_letters("none") == "A"


def test_leval_numbers():
    assert leval.stated_number("so. The answer is $1,200.50 now") == "1200"
    assert leval.stated_number("first 3, then 14 apples\n\nor 99") == "14"
    assert leval.stated_number("no idea") == ""


def test_leval_code():
    assert leval.plain_code("[ [1.0, 2],\n [3, '4'] ]") == "[[1 2][3 4]]"
    # "will be" goes; of the rest the last 1 + 3 words, one for the word of the gold answer.
    assert leval.stated_output("a b c the output will be 7", "7") == "c the output 7"
    assert leval.stated_output("the final output is 5 and that was it", "5") == " 5 and that"


def test_leval_truth():
    assert leval.truth("I think Untrue, not false") == "true"
    assert leval.truth("FALSE.") == "false"
    assert leval.truth("maybe") == "<error>"


def test_without_jieba_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    monkeypatch.setattr(chinese, "_tokenizer", chinese._tokenizer.__wrapped__)
    with pytest.raises(ConfigError, match=r"pip install 'fusiontree\[eval\]'"):
        qa_f1_zh("好", "好")


def test_jieba_loads_nothing_that_others_left_in_the_temporary_folder(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "jieba.cache").write_bytes(b"not a dictionary")
    monkeypatch.setattr(chinese, "_tokenizer", chinese._tokenizer.__wrapped__)
    assert chinese.segment("我爱北京天安门") == ["我", "爱", "北京", "天安门"]
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]
