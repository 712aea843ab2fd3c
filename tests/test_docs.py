"""The site of `make docs`, built afresh: links, formulas and search work, nothing is loaded from another machine,
no page scrolls sideways on a phone, where figures fit, and code fits on a laptop."""

import functools, html.parser, http.server, json, os, queue, re, shutil, subprocess, threading
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

TOP = Path(__file__).parents[1]
TOOLS = TOP / "_docs/.venv/bin/python"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
FLAGS += "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0".split()
PHONE, LAPTOP = 390, 1280  # widths in CSS pixels
SEARCHES = ["/search.html?q=milestone", "/search.html?q=multiple+GPUs"]

lacks_tools = not (TOP / "_docs/.ready").exists() and "CI" not in os.environ  # where everything must be there
pytestmark = pytest.mark.skipif(lacks_tools, reason="needs the tools of the site: run make docs once")

# Opens every page in a frame as wide as a phone, waits for the formulas, and posts what it saw.
VISIT = """<!doctype html><meta charset="utf-8"><body><script>
async function visit(page) {
  const frame = document.createElement("iframe");
  frame.style = "border: 0; width: PHONEpx; height: 800px";
  const loaded = new Promise(done => { frame.onload = done; });
  frame.src = page;
  document.body.append(frame);
  await loaded;
  const inside = frame.contentDocument, all = selector => [...inside.querySelectorAll(selector)];
  if (all(".math").length) await frame.contentWindow.MathJax?.startup?.promise;
  const space = inside.documentElement.clientWidth;
  const scrolls = e => e.tagName != "ARTICLE"
    && (getComputedStyle(e).overflowX != "visible" || scrolls(e.parentElement));
  const sticksOut = e => e === inside.documentElement ? e.scrollWidth > space
    : e.getBoundingClientRect().right > space + 1 && !scrolls(e.parentElement);
  const results = () => all("#search-results ul.search li").length;
  for (let i = 0; page.includes("?q=") && results() < 1 && i < 100; i++)
    await new Promise(done => setTimeout(done, 100));
  const seen = {
    page: page,
    sideways: all("html, article *").filter(sticksOut).map(e => e.outerHTML.slice(0, 100)),
    results: results(),
    formulas: all(".math").length,
    typeset: all(".math mjx-container").length - all("[data-mjx-error]").length,
    wideFigures: all("article img").filter(e => e.getBoundingClientRect().width > space).map(e => e.src),
    copyButtons: all("button.copybtn").length,
    broken: all("img").filter(e => e.loading !== "lazy" && !e.naturalWidth).map(e => e.src),
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
  };
  frame.style.width = "LAPTOPpx";
  await new Promise(done => setTimeout(done, 50));
  const wide = e => e.scrollWidth > e.clientWidth + 1 && e.textContent.split("\\n").every(line => line.length <= 120);
  seen.wideCode = all(".cell_input pre").filter(wide).map(e => e.innerText.slice(0, 60));
  frame.remove();
  return seen;
}
(async () => {
  const seen = [];
  for (const page of PAGES) seen.push(await visit(page));
  await fetch("/seen", {method: "POST", body: JSON.stringify(seen)});
})().catch(error => fetch("/seen", {method: "POST", body: JSON.stringify(String(error.stack))}));
</script>"""

class Page(html.parser.HTMLParser):
    "The anchors of a page, where its links lead, and what it loads."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[k] for k in ("id", "name") if found.get(k)}
        if tag == "a" and "href" in found: self.links.append(found["href"])
        if tag == "link" and found.get("rel") not in ("canonical", "author"): self.loaded.append(found["href"])
        if tag != "a" and found.get("src"): self.loaded.append(found["src"])

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The folder of the site, and what Sphinx complained about."
    folder = tmp_path_factory.mktemp("docs")
    subprocess.run([TOOLS, "docs/pages.py", folder / "source"], cwd=TOP, check=True)
    build = [TOOLS, "-m", "sphinx", "-q", "-c", "docs", folder / "source", folder / "html"]
    done = subprocess.run(build, cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html", done.stderr

@pytest.fixture(scope="module")
def site(built): return built[0]

@pytest.fixture(scope="module")
def pages(site):
    found = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    assert {site / "index.html", site / "nbs/report.html", site / "outputs/records.html"} <= found.keys()
    return found

def test_no_reference_is_unknown(built): assert built[1] == ""

def test_links_lead_somewhere(pages):
    dead = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            if re.match(r"(https?:)?//|mailto:|data:", link): continue
            address, anchor = urldefrag(link)
            target = (path.parent / unquote(address.split("?")[0])).resolve() if address else path
            if not target.is_file(): dead.append((path.name, link))
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids: dead.append((path.name, link))
    assert not dead

def test_nothing_is_loaded_from_another_machine(site, pages):
    loaded = [(path.name, link) for path, page in pages.items() for link in page.loaded]
    outside = [(name, link) for name, link in loaded if re.match(r"\w+://|//", link)]
    for path in site.rglob("*.css"):
        links = re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)", path.read_text(encoding="utf-8"))
        outside += [(path.name, link) for link in links]
    assert not outside

def test_every_figure_of_the_report_leads_to_its_cell_and_records(site):
    text = (site / "nbs/report.html").read_text(encoding="utf-8")
    outputs = re.split(r'<div class="cell_output', text)[1:]
    figures = [o for o in outputs if "<img" in o]
    assert figures
    for after in figures:
        assert re.search(r'<p class="origin">.*?href="#report-.*?href="\.\./outputs/records\.html', after, re.S)

def test_every_figure_has_an_alternative_text(site):
    images = [(p.name, tag) for p in site.rglob("*.html") for tag in re.findall("<img[^>]*>", p.read_text("utf-8"))]
    texts = [(name, re.search(r'alt="([^"]*)"', tag)) for name, tag in images if "toggler" not in tag]  # Sphinx's own
    assert images and [name for name, found in texts if not found or len(found[1]) < 20 or ".png" in found[1]] == []

def test_parameters_are_explained_and_names_lead_to_the_reference(site, pages):
    text = (site / "api/schedule.html").read_text(encoding="utf-8")
    assert "adabatch.schedule.adabatch" in pages[site / "api/schedule.html"].ids
    assert "learning rate is multiplied by it" in re.sub("<[^>]*>", "", text)
    assert "api/schedule.html#adabatch.schedule.Schedule" in " ".join(pages[site / "nbs/00_schedule.html"].links)

def test_no_directive_or_hidden_cell_is_shown(site):
    texts = {p.name: re.sub("<[^>]*>", "", p.read_text(encoding="utf-8")) for p in site.glob("nbs/*.html")}
    assert [n for n, text in texts.items() if re.search(r"#\| *(export|hide|default_exp)|nbdev_export\(", text)] == []

class Server(http.server.SimpleHTTPRequestHandler):
    "Serves the site, and receives what the browser saw."
    def do_GET(self):
        if self.path != "/visit": return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.visit.encode())

    def do_POST(self):
        self.server.seen.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args): pass

@pytest.fixture(scope="module")
def seen(site, pages, tmp_path_factory):
    "What Chromium saw on every page."
    if CHROMIUM is None and "CI" not in os.environ: pytest.skip("needs chromium")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=site))
    addresses = [f"/{path.relative_to(site).as_posix()}" for path in pages] + SEARCHES
    server.visit = VISIT.replace("PHONE", str(PHONE)).replace("LAPTOP", str(LAPTOP))
    server.visit = server.visit.replace("PAGES", json.dumps(addresses))
    server.seen, server.origin = queue.Queue(), f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile = tmp_path_factory.mktemp("profile")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"{server.origin}/visit"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try: result = server.seen.get(timeout=300)
    finally:
        browser.terminate()
        browser.wait(30)
        server.shutdown()
        server.server_close()
    assert isinstance(result, list) and [v["page"] for v in result] == addresses, result
    return server.origin, result

def test_the_browser_asks_no_other_machine(seen):
    origin, visited = seen
    requests = [r for v in visited for r in v["requests"]]
    assert any("site.css" in r for r in requests)
    assert [r for r in requests if not r.startswith((origin, "data:"))] == []
    assert [v["broken"] for v in visited if v["broken"]] == []

def test_formulas_are_typeset(seen):
    formulas = [(v["page"], v["formulas"], v["typeset"]) for v in seen[1] if v["formulas"]]
    assert formulas
    assert [f for f in formulas if f[1] != f[2]] == []

def test_no_page_scrolls_sideways_on_a_phone(seen):
    assert [(v["page"], v["sideways"]) for v in seen[1] if v["sideways"]] == []
    assert [(v["page"], v["wideFigures"]) for v in seen[1] if v["wideFigures"]] == []

def test_code_fits_on_a_laptop_and_can_be_copied(seen):
    assert [(v["page"], v["wideCode"]) for v in seen[1] if v["wideCode"]] == []
    assert [v["copyButtons"] > 10 for v in seen[1] if "your_loop" in v["page"]] == [True]

def test_the_search_finds_pages(seen):
    assert [v["results"] >= 1 for v in seen[1] if v["page"] in SEARCHES] == [True, True]

def test_use_comes_before_evidence_and_pages_describe_themselves(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    captions = re.findall(r'<p class="caption"[^>]*><span class="caption-text">([^<]*)', text)
    assert captions[:2] == ["Use it", "Evidence"]
    page = (site / "nbs/your_loop.html").read_text(encoding="utf-8")
    assert re.search(r"<title>Use it in your loop - adabatch</title>", page)
    assert re.search(r'<meta name="description" content="A batch that grows as planned', page)
