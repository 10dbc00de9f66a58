"""Steps and key words in characters: exact cases, real texts, and speed."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from molsaki.text.segment import segment
from molsaki.text.spans import Spans

DATA = Path(__file__).parents[3] / "shared" / "data"

MAILMAN_QUESTION = (
    "A mailman is tasked with delivering 4 pieces of junk mail to each house in 16 blocks, with each block containing "
    "17 houses. How many pieces of junk mail should he deliver in total?"
)
MAILMAN_RATIONALE = (
    "The mailman delivers 4 pieces of junk mail to each house in 16 blocks, with each block containing 17 houses. "
    "Therefore, the total number of houses is 16 × 17 = 272. Since the mailman delivers 4 pieces of junk mail to each "
    "house, the total number of junk mail pieces is 272 × 4 = 1088."
)


def steps(spans: Spans) -> list[str]:
    return [spans.text[a:b] for a, b in spans.steps]


def words(spans: Spans) -> list[str]:
    return [spans.text[a:b] for a, b in spans.words]


@pytest.mark.parametrize("splitter", ["rules", "periods"])
def test_golden_case_of_the_paper(splitter):
    spans = segment(MAILMAN_QUESTION, MAILMAN_RATIONALE, splitter=splitter)
    assert words(spans) == ["4", "16", "17", "4", "16", "17", "16", "17", "272", "4", "272", "4", "1088"]
    assert [step.split()[0] for step in steps(spans)] == ["A", "How", "The", "Therefore,", "Since"]
    assert [step.split()[-1] for step in steps(spans)] == ["houses.", "total?", "houses.", "272.", "1088."]
    assert spans.text == MAILMAN_QUESTION + " " + MAILMAN_RATIONALE
    assert spans.question == MAILMAN_QUESTION and spans.rationale == MAILMAN_RATIONALE


# The text with a bar at every cut.
STEPS = {
    "stops": "He ran. |Did she? |Yes! |They did",
    "one": "no stop at all",
    "numbers": "Pi is 3.14 and 1,200.50 is more. |It costs $5. |3 of them cost $.50. |Then 4",
    "money": "He had 5. |$3 were left. |€4 too",
    "titles": "Mr. Brown and Mrs. Hilt met Dr. No. |Prof. Li left",
    "latin": "Some, e.g. Tom, i.e. Tommy, vs. Ann, approx. 4. |Bob et al. Went",
    "initials": "J. R. Smith met John F. Kennedy. |The U.S. Army met George W. Bush",
    "initials that end": "He lives in the U.S. |He met team A. |In the U.S. Civil War",
    "letters that are no initials": "Let the price be x. |Tom pays 3 + M. |Ann got an A. |1/4 did not",
    "lower case": "He said no. then yes! and so? well. (we end. |Here",
    "clock": "From 5 a.m. Monday to 6 p.m. 3 times. |At 8 a.m. |Paul left. |At 9 a.m. ET",
    "clock that ends": "She came at 8 p.m. |The end",
    "units": "It is 8 ft. * 20 ft. = 160 sq. ft. ÷ 7 ft. long. |He is 6 ft. 2 tall. |It ran 9 ft. |Then",
    "list": "Steps:\n|1. Add 5. |2. Take 3. |3) Stop. |B. Run. |(C) Sit",
    "list of lines": "1. Add\n|2. Take\n|a. go\n|iv. sit",
    "labels": "Step 1. Add. |Step 2. Take",
    "numbered": "See Fig. 3 and No. 5 of Jan. 2. |He said no. |Then",
    "ellipsis": "Wait... |What?! |So... he left. |Well… |Then . . . |Stop ... here",
    "quotes": 'He said "Go." |She said “Stop.” |(He did.) |( He ran. ) |Then',
    "quoted speech": '"Really?" he asked. |"Yes!" |She left. |"He did."',
    "newlines": "12 + 4\n|= 16\r\n\n  |so 16\u2028|done. \n|then",
    "newline after an abbreviation": "Mr.\n|Smith",
    "no space": "He has 30 apples.|Then she ate 4.|Now?|Yes.|No more",
    "names": "Visit webvan.com or Ph.D. Lee at v1.2.3 of e.g.this. |Then",
    "markdown": "**Step one.** |Add. |**Step two.**\n|- Take",
    "operators": "He has 5 ft. - 3 ft. . |Then he is 4 . |So 9",
    "other scripts": "他有4个苹果。|她呢？|¿Y él? |¡Sí! |Él",
    "Chinese": "小明原来有3个苹果。|妈妈给了他12个。|他……走了。|真的吗？！|“好的。”|（他走了。）|共有15个",
    "Chinese with ASCII stops": "共15个.|他呢?|他有3.5个!|等等...然后 1+2+⋯+100. |好",
    "Japanese": "１２００円から８００円を引く。|残りは４００円です。|円周率は３．１４です．|次",
    "Japanese speech": "「はい。」と答えた。|「いいえ。」|ﾂｷﾞ｡|次",
    "Japanese list": "１．まず足す。|２．次に引く。",
    "Korean": "네. |알겠습니다. |3개입니다.|다음은 5개",
    "Hindi": "राम के पास ३ सेब हैं। |उसने ५ और लिए। |डॉ. शर्मा आए। |रु. 500 दिए। |यह ठीक है. |कुल ८॥ |अब",
    "Arabic": "كم تفاحة لديه؟ |لديه ٣٫٥ تفاحات. |د. أحمد هنا. |المجموع ١٥",
    "Urdu": "سوال؟ |یہ ہے۔ |وہ ہے",
    "Thai": "สมชายมีส้ม 3 ผล |แม่ให้ต่าง ๆ กันอีก 12 ผล และกล้วย |รวมเป็น 15 ผล",
    "Burmese, Khmer": "မင်္ဂလာပါ။ |នេះ។ |បាន",
    "addresses": "See http://a.com/X?Y=1. |Then www.Example.Com/A.B is it. |见http://a.com/x?B=1。|然后",
    "rupees": "It costs Rs. 500. |Then",
}


@pytest.mark.parametrize("name", STEPS)
def test_rules(name):
    expected = STEPS[name].split("|")
    spans = segment("", "".join(expected))
    assert steps(spans) == expected
    assert [step.lstrip() for step in steps(spans)] == steps(spans)  # the white space is the step before's


@pytest.mark.parametrize(
    "text",
    ["He ran. |Did she? Yes! They did. |Mr. |Smith", "3.|14 and 1,200.|50\nnext", "Wait... |what. |. |.", "none"],
)
def test_periods(text):
    assert steps(segment("", text.replace("|", ""), splitter="periods")) == text.split("|")


@pytest.mark.parametrize(
    "text",
    [
        "Eve |7 + |9 = |16. |Next",
        "|3 apples and $|5.50, so |-2 (|1,200.",
        "none",
        "mp3 costs |3. |It is |4",
        "He has |5. |6 more. |She left.",
    ],
)
def test_before_numbers(text):
    expected = [step for step in text.split("|") if step]
    assert steps(segment("", "".join(expected), splitter="numbers")) == expected


@pytest.mark.parametrize("splitter", ["rules", "periods", "numbers"])
@pytest.mark.parametrize(
    "question, rationale, expected, question_end",
    [
        ("How many", "4 more", ["How many ", "4 more"], 8),  # the question's end is a cut without a stop
        ("See Mr.", "Smith ran.", ["See Mr. ", "Smith ran."], 7),
        (" Why? \n", "\n So. ", ["Why? ", "So."], 4),
        ("Why?", "", ["Why?"], 4),
        ("Why?", " \n", ["Why?"], 4),
        ("", "So.", ["So."], 0),
        ("\t", " ", [], 0),
    ],
)
def test_question_end(splitter, question, rationale, expected, question_end):
    spans = segment(question, rationale, splitter=splitter)
    assert steps(spans) == expected
    assert spans.question_end == question_end
    assert (spans.question, spans.rationale) == (question.strip(), rationale.strip())


# The text with its numbers in brackets.
NUMBERS = {
    "plain": "[4] cats, [16]. [1,200.50], [3.14]; [1,000,000] and [12,345]!",
    "lists": "[1],[2],[3] and [1],[2345] and [12],[50]",
    "leading dot": "[.5] and $[.25], [30]*[.5]=[15], ([.3]) and so on...[5] or v.[7]",
    "final dot": "[5]. [6].\n[7]",
    "exponents": "[1e5] [2.5E-3] [1e+6] but [2]e and [3]ex and [10]^[5]",
    "fractions": "[3/4] of it, [24/2]=[12], [1 1/2] cups, [½], [2½] and [3 ¾], [3⁄4]",
    "no fractions": "[24] / [2], [1.5]/[2], [3]/[4.5], [12]/[25]/[2020], [1,000]/[4], [8]:[30]",
    "signs": "[-5] is [3] - [5] = [-2]; ([-5]), x=[-5], [10] - [-5], to [-5], [−5] × [−3], [-.5], [-3/4]",
    "more signs": "'[-1]', [2]/[-2], [5]+[-3], a: [-5]",
    "plus": "[+5] and ([+5]) = [+5] but apples +[5], [3] +[5], [3]+[5]",
    "minus between numbers": "[7]-[5], [7] -[5], [7]–[5], [5]%-[3]%, ([5])-[3], ([5]) -[3], [½]-[1], [5]'-[3]'",
    "minus between amounts": "$[5]-$[3], $[5] -$[3], [5]€-[3]€, [5]€ -[3]",
    "hyphens": "covid-[19], a [2]-[3] split, [10]-year-old, x-[5], [2020]-[01]-[05], buy-[1]-get-[1]",
    "sign on a new line": "[5]\n[-3]",
    "currency": "$[5], €[5], [5]€, $[-5], [-$5], [50]%, #[3], US$[7]",
    "units": "[5]km, [5]th, [3]D, [7]x, [20]am, [2]nd",
    "names": "mp3, AK47, x1, H2O, COUNT_ID14 and __[2] cookies__",
    "products": "[5]x[10], [72] x[1/4], $[2.50]x[14], ([5])x[2], [3]×[4], [5]*[6]",
    "versions": "[192.168].[0.1]",
    "calculator marks": "[48/2] = <<[48/2]=[24]>>[24] clips",
    "scripts without spaces": "有[3]个, 共[15]个。第[1]回 約[1200]円, มี[3]ผล, 제[1]회 약[1200]원",
    "scripts with marks": "cafe\u03015, सेब[३] रु[500], و[5]",
    "full width": "[１２００]円から[８００]円、[１，２００]と[３．１４]、[１／２]、分别是[3]，[200]",
    "local digits": "[१,००,०००] [๑๕] [٣٫٥] [١٬٢٠٠] [३/४] [١٬٢٠٠٬٠٠٠٫٥]",
    "Indian grouping": "[1,00,000] and [12,34,567.5], [1,23,45,678], [1],[2],[3]",
    "European": "[1.234.567] [1.234,56], [12\u00a0345,6] but [1],[5] [1.125],[5.25] [192.168].[0.1]".replace(
        "[1,5]", "[1],[5]"
    ),
    "apostrophes": "[1'234'567.5], [12’000]",
    "LaTeX numbers": "$[9{,}000]$, [12\\,000], [1,\\!000]",
    "LaTeX fractions": "[\\frac{3}{4}], [\\dfrac34], [2\\frac{1}{2}], =[-\\frac{3}{4}], \\$[5], [10]\\%",
    "scales": "[3万], [1万2千]円, [1万2000]円, [1.5亿], [2百万], [3만]원 but [5]千米, [5]千克, [3]百分",
    "signs in other scripts": "温度は[-5]度, 是[-5]，[－５]。[10]元-[3]元=[7]元, コロナ-[19], （[−5]）",
    "signs before currency": "[-$5], profit: [-€1,000.50], =[−￥5], but $[5]-$[3], [5]€-[3]€, x-$[5]",
    "exponents in other scripts": "[1e5]个, [2.5E-3]米, [3]e5x",
    "circled": "①[3]×[4]=[12]",
    "thin spaces": "[12\u2009000] and [3\u00a01/2], [16]\u00a0[17]",
    "other digits": "[５] and [１２] and [٣]",
    "none": "no numbers, not five",
}


def bracketed(text: str) -> list[str]:
    return [piece.split("]")[0] for piece in text.split("[")[1:]]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    text = NUMBERS[name]
    spans = segment("", text.replace("[", "").replace("]", ""))
    assert words(spans) == bracketed(text)


@pytest.mark.parametrize(
    "text",
    [
        "[twenty-five] and [one hundred and five], [Two thousand, three hundred] or [five] and [six]",
        "a [dozen] eggs, [two thirds], [three-quarters], [half], [a hundred], [3] [million], [forty two]",
        "[one million two hundred thousand and one], [zero], [nineteen]",
        "someone tensed; hundreds; fortyish; a-ten-day",
    ],
)
def test_number_words(text):
    expected = ["ten"] if "a-ten-day" in text else bracketed(text)
    text = text.replace("[", "").replace("]", "")
    assert words(segment("", text, number_words=True)) == expected
    assert words(segment("", text)) == [w for w in expected if w[0].isdigit()]


def test_cases_in_chinese_and_japanese():
    """Every number of the texts, five each."""
    spans = segment(
        "小明有3个苹果，妈妈又给了他12个，他现在有多少个苹果？", "他原来有3个，妈妈给了他12个。一共有15个苹果。"
    )
    assert words(spans) == ["3", "12", "3", "12", "15"] and len(spans.steps) == 3
    spans = segment(
        "太郎は１２００円持っています。８００円の本を買うと残りはいくらですか。",
        "１２００円から８００円を引く。残りは４００円です。",
    )
    assert words(spans) == ["１２００", "８００", "１２００", "８００", "４００"] and len(spans.steps) == 4


def test_nothing_reaches_across_the_question_end():
    assert words(segment("I have 1", "1/2 of it")) == ["1", "1/2"]
    assert words(segment("I have 5", "-3 is left")) == ["5", "-3"]
    assert words(segment("ice", "cream", key=["ice cream", "ice"])) == ["ice"]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(question=None), TypeError, "question: expected a str, got NoneType"),
        (dict(rationale=b"x"), TypeError, "rationale: expected a str, got bytes"),
        (dict(splitter="words"), ValueError, "splitter: .*got 'words'"),
        (dict(key="number"), ValueError, "key: .*got 'number'"),
        (dict(key=None), TypeError, "key: .*got NoneType"),
        (dict(key=["a", 3]), TypeError, r"key\[1\]: expected a str, got int"),
        (dict(key=["a", " "]), ValueError, r"key\[1\]: expected a keyword"),
        (dict(key=["a"], number_words=True), ValueError, "number_words"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        segment(**dict(question="Why?", rationale="So.") | arguments)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(steps=((0, 5), (6, 10))), r"steps\[1\]"),
        (dict(steps=((0, 5), (5, 5), (5, 10))), r"steps\[1\]"),
        (dict(steps=((0, 5),)), "steps: .*tile"),
        (dict(steps=((0, 10),)), r"steps\[0\]: .*both"),
        (dict(words=((3, 3),)), r"words\[0\]"),
        (dict(words=((6, 8), (7, 9))), r"words\[1\]"),
        (dict(words=((8, 11),)), r"words\[0\]"),
        (dict(words=((2, 6),)), r"words\[0\]: .*question's end"),
        (dict(question_end=11), "question_end"),
    ],
)
def test_bad_spans(fields, message):
    good = dict(text="Why? So 5.", steps=((0, 5), (5, 10)), words=((8, 9),), question_end=4)
    Spans(**good)
    with pytest.raises(ValueError, match=message):
        Spans(**good | fields)


def check(spans: Spans, question: str, rationale: str) -> None:
    assert (spans.question, spans.rationale) == (question.strip(), rationale.strip())
    assert "".join(steps(spans)) == spans.text  # tiles, see also Spans
    assert all(step.strip() and not step[0].isspace() for step in steps(spans))
    assert all(any(c.isdigit() or c in "¼½¾" for c in word) for word in words(spans))
    if spans.question and spans.rationale:
        assert spans.rationale_start in {start for start, _ in spans.steps}


@pytest.mark.parametrize("name", ["svamp_train", "svamp_train_gpt35", "gsm8k_train", "csqa_train", "asdiv_test"])
def test_real_texts(name):
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {name} here")
    outside = total = 0
    for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        record = json.loads(line)
        question, rationale = record["question"], record.get("rationale") or ""
        spans = segment(question, rationale)
        check(spans, question, rationale)
        inside = sum(c.isdigit() for word in words(spans) for c in word)
        total += sum(c.isdigit() for c in spans.text)
        outside += sum(c.isdigit() for c in spans.text) - inside
    assert outside <= 0.01 * total or name == "csqa_train"  # digits in names, "mp3"


def test_generated_texts():
    rng = random.Random(0)
    marks = ["-", "+", "/", "$", "%", ".", "...", "?", "!", '"', "”", "(", ")", "×", "−", "½"]
    blanks = ["\n", "\r\n", " ", " ", "  ", "\t", "\u00a0"]
    pieces = ["He", "mr.", "Mr.", "U.S.", "3.14", "1,200", "5", "1.", "x", "é", "apples", "and", *marks, *blanks]
    for _ in range(3000):
        question, rationale = ("".join(rng.choices(pieces, k=rng.randrange(15))) for _ in range(2))
        check(segment(question, rationale), question, rationale)
        segment(question, rationale, splitter="periods")
        segment(question, rationale, number_words=True)
        segment(question, rationale, key=["he", "apples and", "x", "$"])


@pytest.mark.parametrize(
    "unit",
    ["He had 4 red apples, e.g. 3.5. Then 7 -5 = 2!\n", " ", ". ", ".", "A. ", "1", "1,234", "1/", " -5", ".(", "x"]
    + [
        "有3个苹果。",
        "1.234.",
        "1,00,",
        "1{,}000",
        "\\frac{1}",
        "1万",
        "a\u0301",
        "१ ",
        "«. ",
        "www.",
        "ที่ ",
        "3，",
        "1'000",
    ],
)
def test_time_is_linear(unit):
    text = "a" + unit * (100_000 // len(unit)) + "5"
    start = time.process_time()
    segment(text, "")
    assert time.process_time() - start < 0.9
