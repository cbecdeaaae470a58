"""Rules of the house that no linter knows. Sources are read as syntax trees, so that a docstring may name what code may
not do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("vtprune", "models", "kernels", "demos")
HOOK = re.compile(r"register_(module_)?(forward|full_backward|backward)\w*")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))))


def at(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def package_of(path: Path) -> list[str]:
    """The package whose names a relative import in ``path`` starts from, as installed."""
    parts = list(path.relative_to(ROOT).parent.parts)
    return ["vtprune", *parts] if parts[0] in ("models", "kernels", "demos") else parts


def imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Absolute dotted names that ``path`` imports anywhere, also inside functions; ``from a import b`` counts as
    ``a.b``."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((".".join([*base, alias.name]), node) for alias in node.names)


def offending_imports(paths: list[Path], *banned: str) -> list[str]:
    def hit(name: str) -> bool:
        return any(name == prefix or name.startswith(prefix + ".") for prefix in banned)

    return [f"{at(path, node)} {name}" for path in paths for name, node in imports(path) if hit(name)]


def changes_foreign_objects(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(attr=name) | ast.Name(id=name) | ast.Constant(value=str(name)) if HOOK.fullmatch(name):
            return True
        case ast.Attribute(attr="__class__", ctx=ast.Store()):
            return True
        case ast.Call(func=ast.Name(id="setattr")):
            return True
    return False


def test_only_the_ledger_hooks_and_sets_foreign_attributes():
    ledger = ROOT / "vtprune" / "core" / "ledger.py"
    assert [
        at(path, node)
        for path in sources(*SHIPPED)
        if path != ledger
        for node in nodes(path)
        if changes_foreign_objects(node)
    ] == []


def named(expression: ast.expr | None) -> set[str]:
    """The exception names of an ``except`` clause."""
    if isinstance(expression, ast.Tuple):
        return set().union(*(named(element) for element in expression.elts))
    return (
        {expression.id}
        if isinstance(expression, ast.Name)
        else {expression.attr}
        if isinstance(expression, ast.Attribute)
        else set()
    )


def swallows_everything(node: ast.AST) -> bool:
    """``except:``, ``except Exception`` and ``suppress(Exception)``; ``except BaseException`` only where its last
    statement raises again."""
    match node:
        case ast.ExceptHandler(type=None):
            return True
        case ast.ExceptHandler(type=kind, body=body):
            again = isinstance(body[-1], ast.Raise) and body[-1].exc is None
            return "Exception" in named(kind) or ("BaseException" in named(kind) and not again)
        case ast.Call(func=ast.Name(id="suppress") | ast.Attribute(attr="suppress"), args=kinds):
            return any(named(kind) & {"Exception", "BaseException"} for kind in kinds)
    return False


def test_nothing_swallows_every_exception():
    assert [at(path, node) for path in sources(*SHIPPED) for node in nodes(path) if swallows_everything(node)] == []


def test_adapters_and_kernels_are_imported_under_their_one_name():
    assert offending_imports(sources(*SHIPPED, "tests"), "models", "kernels") == []


def test_methods_know_no_model_library_and_no_adapter():
    assert offending_imports(sources("vtprune/methods"), "transformers", "timm", "open_clip", "vtprune.models") == []


def test_adapters_know_no_method():
    assert offending_imports(sources("models"), "vtprune.methods") == []


def test_only_triton_kernels_import_triton():
    paths = [
        path for path in sources(*SHIPPED) if not (path.parent == ROOT / "kernels" and path.stem.endswith("_triton"))
    ]
    assert offending_imports(paths, "triton") == []


def multiplies_matrices(node: ast.AST) -> bool:
    match node:
        case ast.BinOp(op=ast.MatMult()) | ast.AugAssign(op=ast.MatMult()):
            return True
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
            return name in (
                "matmul",
                "bmm",
                "mm",
                "einsum",
                "baddbmm",
                "cdist",
                "cosine_similarity",
                "scaled_dot_product_attention",
            )
    return False


def test_methods_compare_tokens_through_kernels_alone():
    assert [
        at(path, node) for path in sources("vtprune/methods") for node in nodes(path) if multiplies_matrices(node)
    ] == []


def opens_text_in_the_locale(node: ast.AST) -> bool:
    """``read_text``, ``write_text`` and ``open`` without ``encoding=``, but for binary modes."""
    match node:
        case ast.Call(func=ast.Attribute(attr="read_text" | "write_text"), keywords=given):
            return not any(k.arg == "encoding" for k in given)
        case ast.Call(
            func=ast.Name(id="open") | ast.Attribute(value=ast.Name(id="path" | "out" | "file"), attr="open"),
            args=args,
            keywords=given,
        ):
            modes = [
                a.value
                for a in (*args, *(k.value for k in given if k.arg == "mode"))
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
            return not any("b" in mode for mode in modes if len(mode) < 4) and not any(
                k.arg == "encoding" for k in given
            )
    return False


def runs_what_it_reads(node: ast.AST) -> bool:
    """Loading that may run code of the file's maker, or start another program: ``from_pretrained`` and ``torch.load``
    that do not say no, pickles, pictures of any format."""
    match node:
        case ast.Call(func=ast.Attribute(attr="from_pretrained"), keywords=given):
            return not any(k.arg in ("trust_remote_code", None) for k in given)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=given):
            return not any(
                k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in given
            )
        case ast.Call(func=ast.Attribute(value=ast.Name(id="pickle"), attr="load" | "loads")):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="Image"), attr="open"), keywords=given):
            return not any(k.arg == "formats" for k in given)
    return False


def test_text_files_are_utf_8_everywhere():
    assert [
        at(path, node)
        for path in sources(*SHIPPED, "benchmarks")
        for node in nodes(path)
        if opens_text_in_the_locale(node)
    ] == []


def test_no_file_that_is_read_runs():
    assert [
        at(path, node) for path in sources(*SHIPPED, "benchmarks") for node in nodes(path) if runs_what_it_reads(node)
    ] == []


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the checkout, without what .gitignore names as folders and without hidden folders other than
    .ci."""
    ignored = [
        line.strip().strip("/")
        for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
        if line.strip().endswith("/")
    ]

    def ours(folder: Path) -> bool:
        return folder.name == ".ci" or not (
            folder.name.startswith(".") or any(folder.match(pattern) for pattern in ignored)
        )

    todo = [ROOT]
    while todo:
        for path in sorted(todo.pop().iterdir()):
            if path.is_dir():
                if ours(path):
                    todo.append(path)
            elif (data := path.read_bytes()) and b"\0" not in data[:4096]:
                yield path, data.decode("utf-8", errors="replace")


# Hosts are put together here so that this file names none of them.
HOSTS = [
    ".".join(parts) for parts in (("pypi", "org"), ("files", "pythonhosted"), ("deb", "debian"), ("registry", "npmjs"))
]
MACHINE_PATH = re.compile(r"(?<![\w.~$)}*-])/(?:work|root|home|workspace|opt|Users)/")


@pytest.mark.parametrize("host", HOSTS)
def test_no_file_names_a_package_registry(host):
    assert [str(path.relative_to(ROOT)) for path, text in texts() if host in text.lower()] == []


def test_no_file_names_a_path_of_one_machine():
    found = [(path, match) for path, text in texts() for match in MACHINE_PATH.finditer(text)]
    assert [
        f"{path.relative_to(ROOT)}:{match.string.count(chr(10), 0, match.start()) + 1}" for path, match in found
    ] == []


def test_the_rules_see_what_they_forbid(tmp_path):
    """The checks above on a file that breaks them, lest they pass because they look past it."""
    bad = """
module.register_forward_pre_hook(f)
getattr(module, "register_full_backward_hook")(f)
module.__class__ = Other
setattr(module, "forward", f)
try: pass
except (ValueError, Exception): pass
except BaseException: pass
except: pass
suppress(Exception)
"""
    good = '''
"""Not module.register_forward_hook, not setattr(x)."""
object.__setattr__(self, "a", 1)
print(self.__class__)
try: pass
except BaseException: undo(); raise
'''
    assert (
        sum(
            map(
                multiplies_matrices,
                ast.walk(
                    ast.parse(
                        "a @ b; torch.bmm(a, b); a.matmul(b); a * b; @decorated\ndef f(): pass".replace("; @", "\n@")
                    )
                ),
            )
        )
        == 3
    )
    found = {name: list(ast.walk(ast.parse(text))) for name, text in (("bad", bad), ("good", good))}
    assert sum(map(changes_foreign_objects, found["bad"])) == 4
    assert sum(map(swallows_everything, found["bad"])) == 4
    assert not any(changes_foreign_objects(node) or swallows_everything(node) for node in found["good"])
    risky = (
        "path.read_text(); path.write_text(x); open(x); path.open('a'); torch.load(x); pickle.load(f); Image.open(f); "
        "A.from_pretrained(x)"
    )
    safe = (
        "path.read_text(encoding='utf-8'); open(x, 'rb'); path.open('a+b'); torch.load(x, weights_only=True); "
        "Image.open(f, formats=f)"
    )
    assert [sum(map(opens_text_in_the_locale, ast.walk(ast.parse(t)))) for t in (risky, safe)] == [4, 0]
    assert [sum(map(runs_what_it_reads, ast.walk(ast.parse(t)))) for t in (risky, safe)] == [4, 0]
    assert MACHINE_PATH.search(" /" + "home/me/model") and not MACHINE_PATH.search("build/work/x ../home/y")


HOST = {
    *(
        "past_key_values",
        "get_seq_length",
        "get_mask_sizes",
        "_attn_implementation",
        "mm_encoder_outputs",
        "deepstack_visual_embeds",
    ),
    *("_prefill", "_get_candidate_generator", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}


def names(node: ast.AST) -> set[str]:
    match node:
        case (
            ast.Attribute(attr=name)
            | ast.Name(id=name)
            | ast.Constant(value=str(name))
            | ast.arg(arg=name)
            | ast.keyword(arg=str(name))
        ):
            return {name}
    return set()


def test_only_the_host_module_names_conventions_of_transformers():
    """What a release renames is mended in one place."""
    host = ROOT / "models" / "engine" / "host.py"
    assert [
        f"{at(path, node)} {names(node) & HOST}"
        for path in sources(*SHIPPED)
        if path != host
        for node in nodes(path)
        if names(node) & HOST
    ] == []
    assert HOST <= {name for node in nodes(host) for name in names(node)}
