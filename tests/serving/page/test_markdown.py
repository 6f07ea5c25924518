"""Markdown to elements, and that nothing a model writes can act."""

import pytest
from playwright.sync_api import expect

from page_actions import ask, becomes

RENDER = """async (text) => {
    const { renderMarkdown } = await import("/page/markdown.js");
    const box = document.createElement("div");
    renderMarkdown(box, text);
    box.querySelectorAll(".code-bar").forEach((bar) => bar.remove());
    const html = box.innerHTML.replaceAll(' target="_blank" rel="noopener noreferrer"', "")
        .replaceAll(/>\\n+/g, ">").replaceAll(/\\n+</g, "<");
    const formulas = [...box.querySelectorAll(".katex")].map((node) => {
        const source = node.querySelector("annotation").textContent;
        const display = Boolean(node.closest(".katex-display"));
        node.remove();
        return [source, display];
    });
    return [html, formulas, box.textContent.replaceAll("\\n", "")];
}"""
CASES = {
    "two\nlines\n\nnext": "<p>two<br>lines</p><p>next</p>",
    "1. a\n\n   ```\n   x\n   ```\n2. b": "<ol><li><p>a</p><pre><code>x</code></pre></li>"
    "<li><p>b</p></li></ol>",
    "> a\n> - [x] b\n\nc": "<blockquote><p>a</p><ul><li>☑ b</li></ul></blockquote><p>c</p>",
    "```py\nif a:\n    b\n\nc\n```\nend": '<pre><code><span class="hljs-keyword">if</span> a:\n'
    "    b\n\nc</code></pre><p>end</p>",
    "```html\n<b onclick='x'>\n```": '<pre><code><span class="hljs-tag">&lt;'
    '<span class="hljs-name">b</span> <span class="hljs-attr">onclick</span>='
    "<span class=\"hljs-string\">'x'</span>&gt;</span></code></pre>",
    "|a|b|\n|-|:-:|\n|1|`x\\|y`|\n|2|": '<div class="table"><table><thead><tr><th>a</th>'
    '<th align="center">b</th></tr></thead><tbody><tr><td>1</td><td align="center">'
    '<code>x|y</code></td></tr><tr><td>2</td><td align="center"></td></tr></tbody>'
    "</table></div>",
    "[a *b*](https://x.example/y_(z))": '<p><a href="https://x.example/y_(z)">a <em>b</em></a></p>',
    'see https://x.example/a_b_c?d=1&e. "end"': '<p>see <a href="https://x.example/a_b_c?d=1&amp;e">'
    'https://x.example/a_b_c?d=1&amp;e</a>. "end"</p>',
    "![picture](https://x.example/a.png)": '<p><a href="https://x.example/a.png">picture</a></p>',
    # Nothing of these may become an element or a link.
    "<b>x</b> &amp;": "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>",
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "[x]( JaVaScRiPt:alert(1))": "<p>[x]( JaVaScRiPt:alert(1))</p>",
    '[x](https://x.example/"onclick="y)': '<p><a href="https://x.example/&quot;onclick=&quot;y">x</a></p>',
    "```<img src=x>\n</code><script>\n```": "<pre><code>&lt;/code&gt;&lt;script&gt;</code></pre>",
}
# Formulas: (source, whether it stands in a line by itself) of each, and the text without them.
MATHS = {
    r"So $x = \frac{1}{2}$, \(y_1\).": ([(r"x = \frac{1}{2}", False), ("y_1", False)], "So , ."),
    "$$\na \\\\\nb\n$$\nend": ([("a \\\\\nb", True)], "end"),
    "Then\n\\[ \\vec{x} \\]\nend": ([("\\vec{x}", True)], "Thenend"),
    "\\begin{align}\na &= b\n\\end{align}": ([("\\begin{align}\na &= b\n\\end{align}", True)], ""),
    "- one\n  $$\n  x\n  $$\n- two $y$": ([("x", True), ("y", False)], "onetwo "),
    "costs $5 or $10, not 3 $ in $HOME:$PATH": ([], "costs $5 or $10, not 3 $ in $HOME:$PATH"),
    "```\n$$\nx\n$$\n```": ([], "$$x$$"),
    "$$\n\\frac{1}{": ([], "$$\\frac{1}{"),
    r"$\undefined$ $\def\a{\a\a}\a$": ([], r"\undefined \def\a{\a\a}\a"),
}
ATTACK = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">
<iframe src="javascript:parent.hacked = 3"></iframe><svg onload="window.hacked = 4">

[click](javascript:window.hacked=5) ![x](x"onerror="window.hacked=6)
<a href="javascript:hacked=7">y</a>

```html
"><script>window.hacked = 8</script>
</code></pre><img src=x onerror=hacked=20><style>body { display: none }</style>
```

| <img src=x onerror=hacked=9> | b |
|---|---|
| <form action=/> | <input autofocus onfocus=hacked=10> |

# <marquee onstart=hacked=11>

$\\href{javascript:hacked=12}{x}$ $\\htmlData{onclick=hacked}{y}$ $\\includegraphics{/v1/models}$
$$\\htmlStyle{position: fixed}{z} \\text{<img src=x onerror=hacked=13>}$$
$<img src=x onerror=hacked=14>$ [ref] <a onmouseover=hacked=15>

[ref]: javascript:hacked=16 "onclick=hacked=17"

- [ ] <input onfocus=hacked=18> &lt;img src=x onerror=hacked=19&gt;
"""


@pytest.fixture(scope="module")
def page(pages):
    """A page with nothing on it."""
    return pages("ipad")


def test_elements_and_formulas(page):
    assert {text: page.evaluate(RENDER, text)[0] for text in CASES} == CASES
    for text, (formulas, rest) in MATHS.items():
        assert page.evaluate(RENDER, text)[1:] == [[*map(list, formulas)], rest], text


def test_each_start_of_a_text_renders_and_long_ones_end(page):
    text = "".join(f"{case}\n\n" for case in (*CASES, *MATHS))
    texts = [text[:end] for end in range(0, len(text), 11)]
    units = ["*", "_", "`", "[", "![a](", "> ", "- ", "|a", "**a ", "<", "https://a", "1. "]
    units += ["~~a", "$", "$a ", "\\(", "\\[", "\\begin{a}"]
    for unit in units:
        texts += [unit * 4000, f"{unit}\n" * 1000]
    page.evaluate(
        f"async (texts) => {{ for (const text of texts) await ({RENDER})(text); }}", texts
    )


def test_growing_text_keeps_what_is_drawn(page):
    """Blocks stay the same elements, and code where it was scrolled to; links open elsewhere."""
    links, same, place = page.evaluate(
        """async () => {
            const { renderMarkdown } = await import("/page/markdown.js");
            const box = document.getElementById("messages");
            box.className = "body";
            renderMarkdown(box, "[a](https://x.example) https://y.example");
            const links = [...box.querySelectorAll("a")].map(({ target, rel }) => [target, rel]);
            const text = "one\\n\\n- a\\n\\n```py\\n" + "wide ".repeat(200);
            renderMarkdown(box, text + "\\na");
            const before = [...box.children];
            const code = box.querySelector("code");
            code.scrollLeft = 500;
            renderMarkdown(box, text + "\\nabc\\n```\\nend");
            return [links, [...box.children].map((node, i) => node === before[i]), code.scrollLeft];
        }"""
    )
    assert links == [["_blank", "noopener noreferrer"]] * 2
    assert (same, place) == ([True, True, True, False], 500)


def test_growing_code_is_coloured_and_stays_as_it_is_written(page):
    """At most ten times a second, and not under a selection."""
    source = "def f(x):  # <b>&amp;\n" + "    return 'a' + x\n" * 9
    text, *keywords = page.evaluate(
        """async (source) => {
            const { renderMarkdown } = await import("/page/markdown.js");
            const box = document.getElementById("messages");
            for (let end = 0; end <= source.length; end += 3) {
                renderMarkdown(box, "```python\\n" + source.slice(0, end));
            }
            const code = box.querySelector("code");
            const count = () => code.querySelectorAll(".hljs-keyword").length;
            const atOnce = count();
            getSelection().selectAllChildren(code);
            await new Promise((resolve) => setTimeout(resolve, 300));
            const selected = count();
            getSelection().removeAllRanges();
            return [code.textContent, atOnce, selected];
        }""",
        source,
    )
    assert source.startswith(text) and len(source) - len(text) < 4
    # The first three letters were a block by themselves.
    assert keywords == [1, 1]
    expect(page.locator(".hljs-keyword")).to_have_count(10)
    assert page.locator("#messages code").text_content() == text


WIDTH_OF = "((name) => document.querySelector(name).getBoundingClientRect().width)"


def test_formulas_are_set_without_inline_styles(script, open_page):
    """The policy forbids style attributes in a text. What KaTeX wants is done in another way."""
    formula = r"$$\vec{x} = \fcolorbox{red}{white}{$\sqrt{\pmb{y}}$} \quad \rule{99em}{1em}$$"
    script.answers = [["Formulas:\n\n", formula]]
    page = open_page("iphone")
    ask(page, "Formulas?", ends=1)
    expect(page.locator(".katex .katex-overlay svg")).to_be_visible()
    becomes(page, "document.fonts.check('16px KaTeX_Math')")
    # It is 0.471em wide.
    becomes(page, f"{WIDTH_OF}('.katex .katex-overlay svg') < 12")
    becomes(page, "scroller.scrollWidth <= scroller.clientWidth")
    becomes(page, f"0 < {WIDTH_OF}('.katex-rule') && {WIDTH_OF}('.katex-rule') < 500")


def test_hostile_answer_does_nothing(script, open_page):
    script.answers = [[ATTACK[i : i + 5] for i in range(0, len(ATTACK), 5)]]
    page = open_page("iphone")
    ask(page, "<img src=x onerror='window.hacked = 0'>", ends=1)
    page.reload()
    body = page.locator(".message.assistant .body")
    expect(body).to_contain_text("<script>window.hacked = 1</script>")
    expect(page.locator(".message.user .body")).to_contain_text("<img src=x")
    expect(page.locator("h1#title")).to_contain_text("<img src=x")
    assert page.evaluate("window.hacked") is None
    inside = page.locator(".message .body")
    expect(inside.locator("script, img, iframe, style, form, input, marquee, a")).to_have_count(0)
    names = "[...document.querySelectorAll('*')].flatMap((node) => node.getAttributeNames())"
    assert not [name for name in page.evaluate(names) if name.startswith("on")]
