"""What this machine is, and whether training will work here: libraries, processor, memory, cards, cache, connections.

    in    nothing; with `measure`, half a minute
    out   findings, each ok, a warning or a problem, with what to do about it; a problem makes training impossible

The one verb that must work where a library is missing or broken, which is why the command line calls it here: api and pipeline import
every library when they are imported. Here each is imported when it is looked at, and what its import says is a finding.
What `--measure` found is kept in the cache as doctor.json.
"""

import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from qlora_lite import OFFLINE_ASKED, show
from qlora_lite.device.tested import CARDS, on_cards
from qlora_lite.memory.kept import KEPT, kept_measurement
from qlora_lite.recipe.hub_names import default_cache
from qlora_lite.units import format_bytes

OK, WARNING, PROBLEM = "ok", "warning", "problem"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")  # each is imported
ENOUGH_MEMORY, ENOUGH_DISK = (
    3 * 2**30,
    10 * 2**30,
)  # bytes: the quickstart's process takes 1.4 GiB; an 8B base in NF4 5.6 GiB
LOOK_S = 0.5  # at other programs
BUSY = 0.3  # load average a core, above which times are not to be trusted
Facts = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and for a warning or a problem what to do."""

    what: str
    level: str
    found: str
    advice: str = ""


def doctor(*, measure: bool) -> dict[str, Any]:
    """Look, show, and return what `--json` prints. Raises UserError when measuring fails."""
    with show.phase("looking at this machine"):
        findings, facts = examine()
    can_train = not any(finding.level == PROBLEM for finding in findings)
    kept = default_cache() / KEPT
    if measure and can_train:
        facts["measured"] = measure_and_keep(kept)
    else:
        facts["measured"] = kept_measurement(kept)
    findings += [*measured_findings(facts["measured"], versions=facts["versions"])]
    show.show_findings([(finding.what, finding.level, finding.found, finding.advice) for finding in findings])
    show.say("training works here" if can_train else "training cannot work here: see the problems above", style="bold")
    return {"can_train": can_train, "findings": [asdict(finding) for finding in findings], **facts}


def examine() -> tuple[list[Finding], Facts]:
    """All findings in order, and the numbers behind them by subject."""
    findings: list[Finding] = []
    facts: Facts = {}
    facts["python"] = look_at_python(findings)
    facts["versions"] = look_at_libraries(findings)
    loaded = {finding.what for finding in findings if finding.level != PROBLEM}
    looks: list[tuple[str, Callable[[list[Finding]], Any], str | None]] = [
        ("bitsandbytes", look_at_bitsandbytes, "bitsandbytes"),
        ("kernels", look_at_kernels, "bitsandbytes"),
        ("cpu", look_at_cpu, "torch"),
        ("other_work", look_at_other_work, None),
        ("memory", look_at_memory, None),
        ("cards", look_at_cards, "torch"),
        ("cache", look_at_cache, None),
        ("connections", look_at_connections, None),
    ]
    for name, look, needs in looks:
        facts[name] = look(findings) if needs is None or needs in loaded else None
    return findings, facts


def look_at_python(findings: list[Finding]) -> Facts:
    version, wanted = platform.python_version(), in_words(own_requirements()[0])
    findings.append(
        Finding("python", OK, f"{version}, within {wanted}")
        if SpecifierSet(wanted).contains(version, prereleases=True)
        else Finding("python", PROBLEM, f"{version}, and qlora_lite needs {wanted}", "Use such a Python")
    )
    return {"version": version, "wanted": wanted, "executable": sys.executable}


def look_at_libraries(findings: list[Finding]) -> dict[str, Facts]:
    """Versions against the ranges in this package's own metadata; LIBRARIES are imported too."""
    wanted = own_requirements()[1]
    facts, others = {}, []
    for name in (*LIBRARIES, *(name for name in sorted(wanted) if name not in LIBRARIES)):
        finding, version = library_finding(name, wanted.get(name, SpecifierSet()))
        facts[name] = {"version": version, "wanted": in_words(wanted.get(name, SpecifierSet())), "level": finding.level}
        if name in LIBRARIES or finding.level != OK:
            findings.append(finding)
        else:
            others.append(name)
    if wanted:
        findings.append(Finding("other libraries", OK, f"{len(others)} more, within their ranges"))
    else:
        advice = "Install it, so that the ranges of its libraries are known: pip install -e ."
        findings.append(Finding("qlora_lite", WARNING, "runs from its source and is not installed", advice))
    return facts


def own_requirements() -> tuple[SpecifierSet, dict[str, SpecifierSet]]:
    """-> (of Python, of each library by name), from this package's own metadata; empty where it is not installed."""
    try:
        own = metadata.metadata("qlora-lite")
    except metadata.PackageNotFoundError:
        return SpecifierSet(), {}
    required = [Requirement(text) for text in own.get_all("Requires-Dist") or []]
    return SpecifierSet(own["Requires-Python"]), {r.name: r.specifier for r in required if r.marker is None}


def library_finding(name: str, wanted: SpecifierSet) -> tuple[Finding, str | None]:
    """-> (finding, version). Older than wanted is a problem, newer a warning: it was not tested."""
    needed = in_words(wanted)
    install = f'Install it with: pip install "{name}{needed}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, PROBLEM, f"is not installed; {needed} is needed", install), None
    error = _import_error(name) if name in LIBRARIES else None
    if error is not None:
        return Finding(name, PROBLEM, f"{version} cannot be imported: {error}", install), version
    if wanted.contains(version, prereleases=True):
        return Finding(name, OK, f"{version}, within {needed}"), version
    is_older = any(s.operator == ">=" and Version(version) < Version(s.version) for s in wanted)
    found = f"{version}, {'older' if is_older else 'newer'} than {needed}"
    return Finding(name, PROBLEM if is_older else WARNING, found, install), version


def in_words(wanted: SpecifierSet) -> str:
    """`>=2.10,<2.15`: the lower bound first."""
    return ",".join(sorted(map(str, wanted), reverse=True))


def look_at_bitsandbytes(findings: list[Finding]) -> Facts:
    """Whether its native library is loaded: without one, quantizing on a card fails at its first use and the CPU takes slow ways."""
    from qlora_lite.base.bnb import native_library

    path, error = native_library()
    is_for_cards, has_card = path is not None and "_cpu" not in Path(path).name, bool(_num_cards())
    name, advice = "bitsandbytes' native library", "Reinstall bitsandbytes; `python -m bitsandbytes` says more"
    if path is None:
        level = PROBLEM if has_card else WARNING
        findings.append(Finding(name, level, f"is not loaded ({error})", advice))
    elif has_card and not is_for_cards:
        findings.append(Finding(name, PROBLEM, f"{Path(path).name} knows no card, and one is here", advice))
    else:
        findings.append(Finding(name, OK, f"{Path(path).name} is loaded"))
    return {"native_library": path, "error": error}


def look_at_kernels(findings: list[Finding]) -> Facts:
    """That bitsandbytes was kept from downloading and running a kernel at its import (import_guard.py)."""
    from qlora_lite.base.bnb import runs_downloaded_kernel

    is_installed, is_loaded = importlib.util.find_spec("kernels") is not None, runs_downloaded_kernel()
    here = "the package kernels is installed" if is_installed else "the package kernels is not installed"
    findings.append(
        Finding(
            "downloaded kernels", PROBLEM, f"bitsandbytes runs one; {here}", "Import qlora_lite before bitsandbytes"
        )
        if is_loaded
        else Finding("downloaded kernels", OK, f"none: {here}, and bitsandbytes is imported without it")
    )
    return {"is_installed": is_installed, "is_loaded": is_loaded}


def look_at_cpu(findings: list[Finding]) -> Facts:
    import torch

    from qlora_lite.device.accelerator import cpu_multiplies_bf16

    facts = {
        "name": _cpu_name(),
        "num_cores": os.cpu_count() or 1,
        "num_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "num_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "has_bf16_products": cpu_multiplies_bf16(),
        "has_avx512_bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "has_amx": bool(torch.cpu._is_amx_tile_supported()),
    }
    found = f"{facts['name']}, usable cores: {facts['num_usable_cores']}, torch's threads: {facts['num_threads']}, {facts['capability']}"
    chosen = "multiplies bf16" if facts["has_bf16_products"] else "does not multiply bf16: model.dtype: auto is fp32"
    findings.append(Finding("processor", OK, f"{found}; {chosen}"))
    return facts


def look_at_other_work(findings: list[Finding]) -> Facts | None:
    """For half a second: threads that wait for one another at every product lose more than the share that others take."""
    if _import_error("psutil") is not None:  # named above
        return None
    from qlora_lite.memory import host

    work = host.OtherWork()
    time.sleep(LOOK_S)
    cores = work.cores()
    remark = host.in_words(cores)
    if remark is None:
        findings.append(Finding("other programs", OK, f"they take {cores:.1f} cores"))
    else:
        advice = "Steps take longer, and measured times are not this machine's own: wait, or close them"
        findings.append(Finding("other programs", WARNING, remark, advice))
    return {"cores": cores}


def look_at_memory(findings: list[Finding]) -> Facts:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free, limit = _free_memory(), _container_limit(total)
    allowed = limit or total
    found = f"{format_bytes(total)}, {'unknown' if free is None else format_bytes(free)} free"
    if limit is not None:
        found += f"; this container may take {format_bytes(limit)}"
    if min(allowed, free if free is not None else allowed) < ENOUGH_MEMORY:
        advice = f"Close other programs: the smallest run takes about {format_bytes(ENOUGH_MEMORY)} with loading"
        findings.append(Finding("memory", WARNING, found, advice))
    elif allowed < total:
        advice = "Plans take the machine's memory for the budget on the CPU: give --budget"
        findings.append(Finding("memory", WARNING, found, advice))
    else:
        findings.append(Finding("memory", OK, found))
    return {"total_bytes": total, "free_bytes": free, "container_limit_bytes": limit}


def look_at_cards(findings: list[Finding]) -> list[Facts]:
    import torch

    facts = []
    for index in range(_num_cards()):
        facts.append(card_facts(index))
        findings.append(card_finding(facts[-1], archs=torch.cuda.get_arch_list()))
    if not facts:
        findings.append(no_card_finding(torch.version.cuda))
    findings += [Finding("tested", *tested_on(card["name"])) for card in facts]
    return facts


def tested_on(name: str) -> tuple[str, str, str]:
    """-> (level, what is known, advice) of this program on such a card."""
    if name in CARDS:
        return OK, f"the checks of tools/gpu_check passed on {name}: {CARDS[name]}", ""
    return WARNING, f"not run on {name} yet; {on_cards()}", "From a clone, `tools/gpu_check --here` says what works"


def card_facts(index: int) -> Facts:
    """One card, as torch sees it; asking for its free memory makes a context on it."""
    from qlora_lite.device.accelerator import card_at_index, free_memory

    card, (free, total) = card_at_index(index), free_memory(index)
    assert card.capability is not None
    return {
        "name": card.name,
        "compute_capability": "{}.{}".format(*card.capability),
        "total_bytes": total,
        "free_bytes": free,
        "has_bf16": card.has_bf16,
    }


def card_finding(card: Facts, *, archs: Sequence[str]) -> Finding:
    """`archs`: what this torch was built for, such as sm_80 and compute_90."""
    what = card["name"]
    found = (
        f"SM {card['compute_capability']}, {format_bytes(card['total_bytes'])}, {format_bytes(card['free_bytes'])} free"
    )
    if not has_code_for(card["compute_capability"], archs):
        advice = "Install a torch that is built for it: https://pytorch.org/get-started"
        return Finding(what, PROBLEM, f"{found}; this torch has no code for it ({', '.join(archs)})", advice)
    if card["free_bytes"] < 0.8 * card["total_bytes"]:
        advice = "Other processes hold the rest (nvidia-smi names them): close them, or give --budget"
        return Finding(what, WARNING, found, advice)
    if not card["has_bf16"]:
        advice = "Training takes fp16 with loss scaling; method: full and modules_to_save need model.dtype: fp32"
        return Finding(what, WARNING, f"{found}, no bf16", advice)
    return Finding(what, OK, f"{found}, computes in bf16")


def has_code_for(capability: str, archs: Sequence[str]) -> bool:
    """Binary code runs on later cards of its major version (sm_86 on 8.9), PTX (compute_90) is compiled for all later ones."""
    major, minor = (int(number) for number in capability.split("."))
    for arch in archs:
        kind, _, digits = arch.partition("_")
        number = int("".join(c for c in digits if c.isdigit()))
        built = number // 10, number % 10
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return not archs


def no_card_finding(built_for: str | None) -> Finding:
    """`built_for`: the CUDA version of this torch, None for a build without."""
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if has_driver and built_for is None:
        advice = "Install a CUDA build of torch: https://pytorch.org/get-started"
        return Finding("card", WARNING, "an NVIDIA driver is here, and this torch is a CPU build", advice)
    if has_driver:
        advice = f"Its driver may be too old for CUDA {built_for}, or CUDA_VISIBLE_DEVICES hides the card"
        return Finding("card", WARNING, "an NVIDIA driver is here, and torch finds no card it can use", advice)
    advice = "The processor trains small models (the quickstart's); plans for a card work: plan --card rtx-4090"
    return Finding("card", WARNING, "none", advice)


def look_at_cache(findings: list[Finding]) -> Facts:
    path = default_cache()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free, is_writable = shutil.disk_usage(there).free, there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    found = f"{path}, {format_bytes(free)} free"
    if not is_writable:
        advice = "Set QLORA_LITE_HOME to a folder that can be written"
        findings.append(Finding("cache", PROBLEM, f"{found}; {there} cannot be written", advice))
    elif free < ENOUGH_DISK:
        advice = (
            f"Free some room, or set QLORA_LITE_HOME: a quantized 8B model and its original take {format_bytes(22e9)}"
        )
        findings.append(Finding("cache", WARNING, found, advice))
    else:
        findings.append(Finding("cache", OK, found))
    return {"path": str(path), "is_writable": is_writable, "free_bytes": free}


def look_at_connections(findings: list[Finding]) -> Facts:
    found = "only `fetch` opens one" if not OFFLINE_ASKED else "none: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set"
    advice = "Unset it to fetch models" if OFFLINE_ASKED else ""
    findings.append(Finding("connections", OK, found, advice))
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    told = {name: os.environ.get(name) for name in names}  # also what this package sets for the libraries
    return {"is_offline_asked": OFFLINE_ASKED, "libraries_are_told": told}


def measure_and_keep(path: Path) -> Facts:
    """Measure the device that training would take, and replace `path` with the result in one step."""
    import torch

    from qlora_lite.commands.overheads import measure
    from qlora_lite.device.accelerator import choose_device
    from qlora_lite.files.staging import write_text_durably

    card, _ = choose_device("auto")
    measured = {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load_average": os.getloadavg()[0],  # of the minute before
        "num_threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        **measure(card.device),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_durably(path, json.dumps(measured, indent=2) + "\n")
    return measured


def measured_findings(measured: Facts | None, *, versions: dict[str, Facts]) -> Iterator[Finding]:
    """What was measured, in words, and whether it is of this installation."""
    if measured is None:
        return
    others = [n for n, version in measured["versions"].items() if versions.get(n, {}).get("version") != version]
    when = str(measured.get("measured_at"))
    yield (
        Finding("measured", WARNING, f"{when}, with another {', '.join(others)}", "Measure again: doctor --measure")
        if others
        else Finding("measured", OK, f"{when}, on {measured.get('card') or measured.get('device')}")
    )
    if measured.get("load_average", 0) > BUSY * (os.cpu_count() or 1):
        found = f"on a busy machine: load average {measured['load_average']:.1f}"
        yield Finding("measured", WARNING, found, "Times are too long and spread out: measure again when it is idle")
    sizes = {
        "imports_rss_bytes": "the process before any model",
        "context_bytes": "the card's context and kernels",
        "cublas_workspace_bytes": "cuBLAS's workspace",
    }
    for key, words in sizes.items():
        if isinstance(measured.get(key), int):
            yield Finding("measured", OK, f"{words}: {format_bytes(measured[key])}")
    overhead = measured.get("allocator_overhead_bytes")
    if isinstance(overhead, dict):
        peak, more = format_bytes(measured["step_peak_bytes"]), _spread_in_words(overhead, format_bytes)
        yield Finding("measured", OK, f"a step of {peak} by the allocator takes of the system in addition {more}")
    if isinstance(measured.get("fragmentation_bytes"), int):
        words = f"the allocator holds {format_bytes(measured['fragmentation_bytes'])} more than it gives, after rows of many lengths"
        yield Finding("measured", OK, words)
    written = measured.get("disk_write_bytes_per_s")
    if isinstance(written, dict):
        words = _spread_in_words(written, lambda rate: f"{format_bytes(int(rate))}/s")
        yield Finding("measured", OK, f"the cache's disk is written with {words}, until it is durable")
    price = measured.get("dequantize", {}).get("dequantize_tokens")
    if isinstance(price, dict):
        words = _spread_in_words(price, lambda tokens: f"{tokens:.0f}")
        yield Finding("measured", OK, f"dequantizing a weight takes as long as its product with {words} tokens")


def _spread_in_words(found: Facts, words: Callable[[float], str]) -> str:
    return f"{words(found['median'])} ({words(found['low'])} to {words(found['high'])})"


def _import_error(name: str) -> str | None:
    """The first line of what importing it raises; warnings are left out, they come again when it matters."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except Exception as error:  # a broken library can raise anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def _num_cards() -> int:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old: no_card_finding says so
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _free_memory() -> int | None:
    """What a new process could take without swapping; None outside Linux."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _container_limit(total: int) -> int | None:
    """The control group's limit on memory (v2, else v1); None where there is none below the machine's `total`."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < total else None  # v1 writes a huge number for none
    return None
