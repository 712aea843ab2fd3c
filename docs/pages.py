"""Write the pages of the site (notebooks, README, reference, records) from the repository into a folder for Sphinx.

    python docs/pages.py FOLDER
"""
import ast
import io
import json
import os
import re
import shutil
import sys
import tokenize
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "adabatch"


def copy_linked(
    text: str,  # Markdown
    source: Path,  # folder of the repository that its links start from
    target: Path,  # the same folder of the site
):
    "Copy the files that `text` links to (figures, data, other Markdown) to where its links will look for them."
    for link in re.findall(r"\]\(([^)#:\s]+)", text):
        if (source / link).is_file() and Path(link).suffix != ".ipynb" and not (target / link).exists():
            (target / link).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / link, target / link)


def markdown_cell(text: str) -> dict:
    return {"cell_type": "markdown", "id": uuid.uuid4().hex[:8], "metadata": {}, "source": text}


def alternative_text(text: str) -> str:
    "What the last paragraph of Markdown above a figure says, without markup: for those who do not see the figure."
    paragraph = text.strip().split("\n\n")[-1]
    return "Figure: " + " ".join(re.sub(r"\]\([^)]*\)|[\[\]*`$#>|]", "", paragraph).split())


def origin(label: str, source: str, datasets: list[str], up: str) -> dict:
    "The line below an output: the cell that made it, and the records of the data sets that this cell names."
    named = [d for d in datasets if f'"{d}"' in source]
    records = ", ".join(f"[{d}](#records-{d})" for d in named) or f"[all]({up}outputs/records.md)"
    return markdown_cell(f"{{.origin}}\n[Cell that made this](#{label}) · Records: {records}")


def link_from(
    outputs: list[dict],  # of an executed cell, changed in place
    folder: Path,  # of the executed notebook
    page: Path,  # where it stands on the site
):
    "Make the links in the Markdown of outputs lead there from the page; the notebooks of single runs are not on it."
    def moved(link): return f"]({Path(os.path.relpath(folder / link[1], page.parent)).as_posix()})"

    for data in (o["data"] for o in outputs if "text/markdown" in o.get("data", ())):
        text = re.sub(r"\[([^\]]*)\]\([^)\s]+\.ipynb\)", r"\1", "".join(data["text/markdown"]))
        data["text/markdown"] = re.sub(r"\]\(([^)#:\s]+)\)", moved, text)


def only_imports(source: str) -> bool:
    "Imports are there for whoever runs the notebook; the site folds them."
    try: return all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in ast.parse(source).body)
    except SyntaxError: return False  # a cell with magics


def notebook_pages(target: Path, datasets: list[str]) -> dict[str, str]:
    "Write the notebooks, executed where `outputs/` has them executed. Returns the label of every code cell by its id."
    labels = {}
    paths = {p.relative_to(ROOT): p for p in ROOT.glob("nbs/*.ipynb") if not any(ROOT.glob(f"outputs/*/{p.name}"))}
    paths |= {Path("nbs", p.name): p for p in ROOT.glob("outputs/*.ipynb")}
    paths |= {p.relative_to(ROOT): p for p in ROOT.glob("outputs/*/*.ipynb")}
    for page, path in sorted(paths.items()):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        executed, cells, above = path.is_relative_to(ROOT / "outputs"), [], ""
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown": copy_linked(source, ROOT / page.parent, target / page.parent)
            if cell["cell_type"] != "code":
                above = alternative_text(source)
                cells.append({**cell, "source": source})
                continue
            exported = re.search(r"^#\| *default_exp +(\w+)", source, re.M)
            if exported and (ROOT / PACKAGE / f"{exported[1]}.py").exists():
                module = f"{PACKAGE}.{exported[1]}"
                cells.append(markdown_cell(f"{{.origin}}\nReference: {{doc}}`{module} </api/{exported[1]}>`"))
            hidden = re.search(r"^#\| *hide *$", source, re.M)
            source = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
            if hidden or not source.strip(): continue
            label = "-".join([*page.parent.parts[1:], page.stem, cell["id"]])
            if page.parent == Path("nbs"): labels[cell["id"]] = label
            folded = {"tags": ["hide-input"]} if executed or only_imports(source) else {}
            metadata = {"mystnb": {"image": {"alt": above}}} | folded
            link_from(cell["outputs"], path.parent.relative_to(ROOT), page)
            cells += [markdown_cell(f"({label})="), {**cell, "metadata": metadata, "source": source}]
            if executed and any({"image/png", "text/markdown"} & set(o.get("data", ())) for o in cell["outputs"]):
                cells.append(origin(label, source, datasets, "../" * len(page.parent.parts)))
        notebook["cells"] = cells
        (target / page).parent.mkdir(parents=True, exist_ok=True)
        (target / page).write_text(json.dumps(notebook), encoding="utf-8")
    return labels


def records_page(target: Path):
    "A table of all record files, a section a data set."
    lines = ["# Records", "", "Every number of the report is computed from these files. `np.load(path)` opens them, "
             "and the notebook that made or shows a run lies beside its record in the repository."]
    stored = sorted(ROOT.glob("nbs/*.json"))
    links = ", ".join(f"[{p.name}](../nbs/{p.name})" for p in stored)
    if stored: lines += ["", f"Stored figures of other reproductions: {links}"]
    for dataset in data_sets():
        lines += ["", f"(records-{dataset})=", f"## {dataset}", "", "| network | arm | records |", "|---|---|---|"]
        arms = {}
        for p in (ROOT / "outputs" / dataset).glob("*/*.npz"):
            arm, _, seed = p.stem.rpartition("-seed")
            arms.setdefault((p.parent.name, arm), []).append((int(seed) if seed.isdigit() else 0, p))
        for (model, arm), runs in sorted(arms.items()):
            links = ", ".join(f"[seed {k}]({p.relative_to(ROOT / 'outputs').as_posix()})" for k, p in sorted(runs))
            lines.append(f"| {model} | {arm} | {links} |")
    text = "\n".join(lines) + "\n"
    (target / "outputs").mkdir(exist_ok=True)
    (target / "outputs/records.md").write_text(text, encoding="utf-8")
    copy_linked(text, ROOT / "outputs", target / "outputs")


def data_sets() -> list[str]:
    return sorted({p.parts[-3] for p in ROOT.glob("outputs/*/*/*.npz")})


class Module:
    "An exported module, read but not imported: its public definitions, with the comments beside their parameters."

    def __init__(self, path: Path):
        self.name, text = path.stem, path.read_text(encoding="utf-8")
        self.tree, self.lines = ast.parse(text), text.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        self.summary = (ast.get_docstring(self.tree) or "").split("\n")[0]
        exported = [n.value for n in self.tree.body if "__all__" in self.defined(n)]
        public = ast.literal_eval(exported[0]) if exported else []
        self.public = {name: n for n in self.tree.body for name in self.defined(n) if name in public}

    @staticmethod
    def defined(node: ast.stmt) -> list[str]:
        "The names that a statement defines."
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return [node.name]
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        return [t.id for t in targets if isinstance(t, ast.Name)]

    def parameters(self, function: ast.FunctionDef) -> tuple[str, list[str]]:
        "Signature and field list of a function."
        arguments, returns = function.args, function.returns
        every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
        every = [a for a in every if a and a.arg not in ("self", "cls")]
        end = returns.end_lineno if returns else 0
        commented = [a for a in every if a.lineno in self.comments and a.lineno != end]
        fields = [f":param {a.arg}: {self.comments[a.lineno]}" for a in commented]
        if end in self.comments and function.body[0].lineno > end: fields.append(f":returns: {self.comments[end]}")
        arguments.args = [a for a in arguments.args if a.arg not in ("self", "cls")]
        return f"({ast.unparse(arguments)})" + (f" -> {ast.unparse(returns)}" if returns else ""), fields

    def describe(self, name: str, node: ast.stmt, labels: dict[str, str], fence: str = "`````") -> list[str]:
        "The directive of a definition, with its methods in it."
        kind, signature, fields, inner = "py:data", "", [], []
        if isinstance(node, ast.FunctionDef):
            signature, fields = self.parameters(node)
            kind = "py:function" if len(fence) == 5 else "py:method"
            if "property" in map(ast.unparse, node.decorator_list): kind, signature = "py:property", ""
        elif isinstance(node, ast.ClassDef):
            kind = "py:class"
            attributes = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            if attributes: signature = "(" + ", ".join(ast.unparse(n) for n in attributes) + ")"
            commented = [n for n in attributes if n.lineno in self.comments]
            fields = [f":param {n.target.id}: {self.comments[n.lineno]}" for n in commented]
            for n in node.body:
                if not isinstance(n, ast.FunctionDef): continue
                if any(ast.unparse(d).endswith(".setter") for d in n.decorator_list): continue  # the property is there
                if n.name == "__init__": signature, fields = self.parameters(n)
                elif not n.name.startswith("_"): inner += self.describe(n.name, n, labels, "````")
        elif node.lineno in self.comments: inner = [self.comments[node.lineno]]
        text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""
        lines = [f"{fence}{{{kind}}} {name}{signature}", "", text or "", "", *fields, "", *inner]
        cells = [m[1] for line in self.lines[:node.lineno] if (m := re.match(r"# %% .*#(\w+)$", line))]
        if len(fence) == 5 and cells and cells[-1] in labels:
            lines += ["", "{.origin}", f"[Definition and examples](#{labels[cells[-1]]})"]
        return [*lines, fence, ""]

    def page(self, labels: dict[str, str]) -> str:
        "The reference of the module, Markdown."
        full = f"{PACKAGE}.{self.name}"
        lines = [f"# {full}", "", f"```{{py:module}} {full}", "```", "", ast.get_docstring(self.tree) or "", ""]
        for name, node in self.public.items(): lines += self.describe(name, node, labels)
        return "\n".join(lines)


def modules() -> list[Module]:
    found = [Module(p) for p in sorted((ROOT / PACKAGE).glob("[!_]*.py"))]
    return [m for m in found if m.public]


def public_page(found: list[Module]) -> str:
    "What `from adabatch import ...` gives, a line each, and a list of the modules."
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    names = next(ast.literal_eval(n.value) for n in tree.body if "__all__" in Module.defined(n))
    lines = ["# Public names", "", "What `from adabatch import ...` gives:", ""]
    for name in names:
        module = next(m for m in found if name in m.public)
        first = re.match(r".*?[.;:](?=\s|$)", ast.get_docstring(module.public[name]), re.S)[0].rstrip(";:.")
        lines.append(f"- {{py:obj}}`{name} <{PACKAGE}.{module.name}.{name}>`: {first}")
    lines += ["", "All else is in the modules:", ""]
    return "\n".join(lines + [f"- [{PACKAGE}.{m.name}]({m.name}.md): {m.summary}" for m in found]) + "\n"


def contents(target: Path) -> str:
    "The list of pages at the side, from what there is."
    executed = [f"All arms on {p.parent.name} <{p.relative_to(target).as_posix()}>"
                for p in sorted(target.glob("outputs/*/gallery.ipynb"))]
    placed = "your_loop.ipynb", "report.ipynb"
    notebooks = sorted(f"nbs/{p.name}" for p in target.glob("nbs/*.ipynb") if p.name not in placed)
    others = sorted(p.name for p in target.glob("*.md"))
    groups = {"Use it": ["nbs/your_loop.ipynb", "api/index"],
              "Evidence": ["nbs/report.ipynb", *executed, "outputs/records"], "Notebooks": notebooks,
              "Reference": [f"api/{m.name}" for m in modules()], "Project": others}
    shown = {name: pages for name, pages in groups.items() if pages}
    trees = (["```{toctree}", ":hidden:", f":caption: {name}", "", *pages, "```"] for name, pages in shown.items())
    return "\n".join(["", *("\n".join(tree) + "\n" for tree in trees)])


def write(target: Path):
    "Write all pages into the folder `target`, which is emptied first."
    shutil.rmtree(target, ignore_errors=True)
    (target / "api").mkdir(parents=True)
    labels = notebook_pages(target, data_sets())
    for module in modules(): (target / f"api/{module.name}.md").write_text(module.page(labels), encoding="utf-8")
    (target / "api/index.md").write_text(public_page(modules()), encoding="utf-8")
    records_page(target)
    readme = re.sub(r"\]\(outputs/(\w+\.ipynb)", r"](nbs/\1", (ROOT / "README.md").read_text(encoding="utf-8"))
    copy_linked(readme, ROOT, target)
    (target / "index.md").write_text(readme + contents(target), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
