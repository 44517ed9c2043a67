"""Test names in a results file that contain code, markup, object keys or expressions."""

from sparselogits.lab.compare.results import Results, RunRow
from sparselogits.lab.report import write_report
from sparselogits.untrusted import printable
from tests.lab.report.browser import PHONE, cut_off, faint_texts, opened
from tests.lab.report.material import comparison, method

NAMES = [
    *("__proto__", "constructor", "toString", "hasOwnProperty"),  # keys of every object
    *("null", "true", "0", "NaN", " "),  # other values of JSON
    *("a.b[c]", "back\\slash", "quote'\"`", "',alert(1),'", "sort(", "datum.method"),  # expressions
    *("$x^2$ \\frac{1}{2}", "{{7*7}}{% raw %}", "${7*7}", "%s %d", "var(--c0)"),  # templates
    *("<script>alert(1)</script>", "</script><img src=x onerror=document.title=1>", "&amp; &lt;"),
    *("javascript:alert(1)", "https://example.org/a.png", "url(https://example.org/x)"),
    *(
        "\u202eright to left",
        "null\x00byte",
        "\x1b[31mred\x07",
        "tab\tnew\nline",
        "日本語 😀 naïve",
    ),
    "x" * 3000,
]


def hostile() -> Results:
    made = comparison()
    rows = [*made.methods[:2]]
    for number, name in enumerate(NAMES):
        family = "systematic" if number % 2 else "topk"
        rows.append(method(name, family, 4 + number / 50, 3.0 + number))
    rows += [
        method("infinite", "systematic", float("inf"), 5.0),
        method("not a number", "systematic", float("nan"), 7.0),
        method("no entries", "systematic", 4.2, 0.0),
    ]
    curve = [(1, 6.0), (2, float("nan")), (3, 4.5)]
    runs = [
        RunRow(method=row.method, student="small", seed=0, status="done", curve=curve)
        for row in rows
    ]
    return made.model_copy(update={"methods": rows, "runs": runs, "title": NAMES[22]})


def test_names_are_text_and_methods_can_be_switched(browser, tmp_path):
    path = write_report(hostile(), tmp_path)
    with opened(browser, path.as_uri(), size=PHONE, expected="Infinite extent") as page:
        assert cut_off(page) == []
        assert faint_texts(page) == []
        seen = page.locator("#methods-0 tbody .name bdi").all_text_contents()
        assert {printable(name, 120) for name in NAMES} <= set(seen)
        assert page.locator("img, script[src], iframe").count() == 0
        assert page.title() == NAMES[22]
        states = page.locator("#methods-0 tbody button.toggle").evaluate_all(
            """all => all.slice(0, 18).map((each) => {
              const before = each.ariaPressed;
              each.click();
              const between = each.ariaPressed;
              each.click();
              return before !== between && before === each.ariaPressed;
            })"""
        )
        assert states == [True] * 18
        for head in page.locator("#methods-0 thead button").all():
            head.evaluate("each => each.click()")  # sorts by each column
        assert page.locator("#training-0 svg .mark-line path").count() >= len(NAMES)
    assert len(list((tmp_path / "figures").iterdir())) == 4
