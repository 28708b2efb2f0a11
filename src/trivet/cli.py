"""The command line. It parses, calls a verb of `trivet.api`, and prints; PyTorch is imported only by what needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from trivet.display import show, show_json, show_models
from trivet.errors import TrivetError

app = typer.Typer(
    name="trivet",
    help="Train neural networks that are robust, private and small at once, with every claim proved or measured.",
    epilog="Start with `trivet demo`, or `trivet recipes` and then `trivet train RECIPE`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")]
TargetArgument = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a .pt2, .onnx or .safetensors file.")
]
RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders that have been audited.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Instead of the recipe's data: a source's name (digits, mnist, cifar10), a folder of Parquet files or of "
        "images in train/CLASS and test/CLASS, an .npz file, or hub:NAME.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a setting, e.g. threat.eps=8/255 or fit.epochs=3. Repeatable."
    ),
]
Out = Annotated[str | None, typer.Option("--out", metavar="DIR", help="The folder to write to.")]
ForRecipe = Annotated[
    str | None,
    typer.Option("--recipe", metavar="RECIPE", help="For a model file: whose data, threat and audit settings to use."),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-code", help="Let the recipe inside a run folder import the code it names. Read it first."),
]
Device = Annotated[str, typer.Option(help="A torch device, e.g. cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.callback()
def _program(
    keep_memory: Annotated[
        bool,
        typer.Option(help="Keep freed memory in the process: 1.4 to 2.2 times faster training steps on glibc systems."),
    ] = True,
) -> None:
    if keep_memory:
        from trivet import machine

        machine.keep_memory()


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes that come with Trivet."""
    from trivet.audit.labels import threat_name
    from trivet.recipes.recipe import load, shipped

    rows = [
        {
            "recipe": name,
            "about": (recipe := load(name).recipe).about,
            "data": (recipe.data or recipe.environment or {}).get("name", "--data"),
            "threat": threat_name(recipe.threat),
            "paper": recipe.paper,
        }
        for name in shipped()
    ]
    show(rows, as_json)


@app.command()
def methods(
    room: Annotated[str | None, typer.Option(help="Only one room: threats, objectives, certify, …")] = None,
    as_json: Json = False,
) -> None:
    """List every method with its paper, the room it lives in and the legs it serves; with --room, its settings."""
    from trivet import methods as register

    if room is not None and room not in register.ROOMS:
        raise TrivetError(f"there is no room {room!r}; choose one of: {', '.join(register.ROOMS)}.")
    rows = [
        {
            "room": each.room,
            "name": each.name,
            "method": each.title + (f" ({each.note})" if each.note else ""),
            "paper": each.paper,
            "legs": " ".join(each.legs),
            **({"settings": ", ".join(each.settings)} if as_json or room else {}),
        }
        for each in register.methods(room)
    ]
    show(rows, as_json)


@app.command()
def train(
    recipe: RecipeArgument,
    data: Data = None,
    out: Out = None,
    override: Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; RECIPE may be its folder.")
    ] = False,
    device: Device = "cpu",
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Run a recipe's stages, and write model, log and claims into a run folder (runs/NAME unless --out is given)."""
    from trivet import api

    run = api.train_model(
        recipe, data=data, out=out, overrides=override or (), resume=resume, trust_code=trust_code, device=device
    )
    if as_json:
        show_json({"run": str(run.folder.path), "history": run.history})
    else:
        print(f"trained: {run.folder.path}\nnext:    trivet audit {run.folder.path}")


@app.command()
def audit(
    target: TargetArgument,
    recipe: ForRecipe = None,
    data: Data = None,
    override: Set = None,
    out: Out = None,
    trust_code: Trust = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Attack, certify and measure a model; write audit.json, claims.json and report.html."""
    from trivet import api
    from trivet.audit.report import comparison
    from trivet.runs import audit_folder

    if api.is_policy(target):
        if recipe or data or out:
            raise TrivetError(f"{target} is a policy's run folder; audit it without --recipe, --data and --out.")
        _show_policy(api.audit_policy(target, overrides=override or (), trust_code=trust_code, device=device), as_json)
        return
    subject = api.audit_model(
        target, recipe=recipe, data=data, overrides=override or (), out=out, trust_code=trust_code, device=device
    )
    if as_json:
        show_json(subject.findings.model_dump(mode="json"))
    else:
        show_models(comparison([subject]))
        for check in subject.findings.flags:
            print(f"{check.severity}: {check.title}: {check.meaning}")
        print(f"report: {audit_folder(target, out) / 'report.html'}")
    refuted = [leak for leak in subject.findings.leaks if leak.contradicts]
    for leak in refuted:
        print(
            f"trivet: {leak.label} shows epsilon >= {leak.lower:.3g} where {leak.claimed:.3g} was claimed; the claim "
            "is void, and training does not do what its account says.",
            file=sys.stderr,
        )
    if refuted:
        raise typer.Exit(1)


@app.command()
def certify(
    target: Annotated[str | None, typer.Argument(metavar="[RUN|MODEL]", help="As for audit.")] = None,
    onnx: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="With --vnnlib, instead of RUN: decide a property of this network."),
    ] = None,
    vnnlib: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The property, in VNN-LIB. Status 0: it holds; 1: it does not; 3: unknown."),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="With --vnnlib: seconds, 120 unless given.")] = None,
    arithmetic: Annotated[
        str | None,
        typer.Option(
            metavar="float32|real",
            help="With --vnnlib: what a proof covers; float32, which includes real, unless given.",
        ),
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Noise of randomized smoothing, in pixel units; the recipe's otherwise.")
    ] = None,
    n: Annotated[
        int | None, typer.Option(help="With --sigma: noisy copies per input, 10000 unless given; papers use 100000.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="With --sigma: how likely each certificate may be wrong, 0.001 unless given.")
    ] = None,
    radii: Annotated[
        str | None,
        typer.Option(
            metavar="R,R,…",
            help="With --sigma: only find out which of these radii hold, with as many copies as each input needs and "
            "100000 at most. Include 0 to know the class where no other holds.",
        ),
    ] = None,
    points: Annotated[int | None, typer.Option(help="Certify the first so many test points.")] = None,
    processes: Annotated[int, typer.Option(help="Share the points among so many processes.")] = 1,
    recipe: ForRecipe = None,
    data: Data = None,
    override: Set = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="DIR|FILE", help="The folder to write to; with --vnnlib, the file of the result."
        ),
    ] = None,
    trust_code: Trust = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Prove the model's answers constant around test points, one certificate each; or decide one VNN-LIB property."""
    asked_about = {"timeout": timeout, "arithmetic": arithmetic}
    if onnx is not None or vnnlib is not None:
        others: dict[str, Any] = {"RUN|MODEL": target, "--sigma": sigma, "--n": n, "--alpha": alpha, "--radii": radii}
        others |= {"--points": points, "--recipe": recipe, "--data": data, "--set": override}
        for name in [name for name, value in others.items() if value is not None]:
            raise TrivetError(f"--onnx and --vnnlib decide a property of a file; leave out {name}.")
        if onnx is None or vnnlib is None:
            raise TrivetError("--onnx and --vnnlib go together: the network, and the property to decide.")
        _decide(onnx, vnnlib, {name: value for name, value in asked_about.items() if value is not None}, out, as_json)
        return
    for name in [name for name, value in asked_about.items() if value is not None]:
        raise TrivetError(f"--{name} goes with --onnx and --vnnlib.")
    if target is None:
        raise TrivetError("name a run folder or a model file, or give --onnx and --vnnlib.")
    from trivet import api
    from trivet.certify.curves import average_certified_radius, certified_accuracy, format_radius, share_histogram

    settings: dict[str, Any] = {"n": n, "alpha": alpha, "radii": radii}
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given if sigma is None else ():
        raise TrivetError(f"--{name} goes with --sigma; the recipe's own is --set audit.certificate.{name}=….")
    certifier = None if sigma is None else _smoothing(sigma, given)
    found = api.certify_model(
        target,
        recipe=recipe,
        data=data,
        overrides=override or (),
        out=out,
        trust_code=trust_code,
        device=device,
        certifier=certifier,
        points=points,
        processes=processes,
    )
    top = float(found.certificates.radii.max())
    asked = getattr(found.certifier, "radii", ())
    steps = asked or [top * step / 8 for step in range(8)]
    rates = certified_accuracy(found.certificates, found.targets, steps)
    rows = [
        {
            "radius": f"{radius:g}" if asked else format_radius(radius),
            "certified": round(100 * rate.value, 2),
            "from": round(100 * rate.interval[0], 2),
            "to": round(100 * rate.interval[1], 2),
        }
        for radius, rate in zip(steps, rates, strict=True)
    ]
    shares = found.certifier.shares(found.certificates)
    votes = None if shares is None else share_histogram(shares)
    if as_json:
        average = average_certified_radius(found.certificates, found.targets)
        show_json(
            {
                "norm": found.certificates.norm,
                "points": len(found.certificates),
                "average_radius": average,
                "abstained": int(found.certificates.abstained.sum()),
                "curve": rows,
                "shares": votes,
            }
        )
        return
    show(
        rows,
        False,
        title=f"{found.certificates.norm}, {len(found.certificates)} points: certified, in % with 95 % interval",
    )
    if votes is not None:
        steps_up = "".join("▁▂▃▄▅▆▇█"[-(-7 * count // max(votes))] for count in votes)
        print(f"points by their share of votes for the class, 0 {steps_up} 1")
    for condition in found.certificates.conditions:
        print(f"  - {condition}")


def _smoothing(sigma: float, settings: dict[str, Any]) -> Any:
    """The certifier that `certify --sigma` asks for: every input alike, or by `radii` as many copies as it needs."""
    from trivet.certify.adaptive_smoothing import AdaptiveSmoothing
    from trivet.certify.smoothing import Smoothing

    if "radii" not in settings:
        return Smoothing(sigma, **settings)
    try:
        radii = tuple(float(each) for each in settings["radii"].split(","))
    except ValueError:
        raise TrivetError(f"--radii {settings['radii']} must be numbers with commas between, as 0,0.5,1.") from None
    return AdaptiveSmoothing(sigma, **(settings | {"radii": radii}))


def _decide(onnx: str, vnnlib: str, settings: dict[str, Any], out: str | None, as_json: bool) -> None:
    """Decide a property; the exit status says 0 where it holds, 1 where it does not, 3 where that stays unknown."""
    from dataclasses import asdict

    from trivet.certify.competition import decide, result_word

    verdict = decide(onnx, vnnlib, out=out, **settings)
    if as_json:
        show_json({**asdict(verdict), "result": result_word(verdict)})
    else:
        holds = f", for {'real' if verdict.arithmetic == 'real' else 'real and float32'} arithmetic"
        print(f"{verdict.answer}: {verdict.reason}")
        print(f"{verdict.boxes} parts in {verdict.seconds:.1f} s{holds if verdict.answer == 'verified' else ''}")
        if verdict.witness is not None:
            print("inputs:  " + " ".join(map(repr, verdict.witness.inputs)))
            print("outputs: " + " ".join(map(repr, verdict.witness.outputs)))
    status = {"verified": 0, "falsified": 1, "unknown": 3}.get(verdict.answer, 2)
    if status:
        raise typer.Exit(status)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    to: Annotated[str, typer.Option(metavar="onnx|pt2|packed", help="The format.")],
    int8: Annotated[bool, typer.Option("--int8", help="Weights and activations in eight bits.")] = False,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="The file; in RUN otherwise.")] = None,
    calibrate_on: Annotated[str | None, typer.Option(metavar="DATA", help="With --int8: public data for it.")] = None,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a run's model to a file for a runtime, compare their answers, and issue claims for the file."""
    if calibrate_on is not None and not int8:
        raise TrivetError("--calibrate-on goes with --int8.")
    from dataclasses import asdict

    from trivet import api, exporting

    made = api.export_model(run, to=to, int8=int8, out=out, calibrate_on=calibrate_on, trust_code=trust_code)
    if as_json:
        show_json(asdict(made))
        return
    show(exporting.rows(made), False, title=f"{made.path}: {made.bytes:,} bytes, {made.format}")
    print("\n".join(exporting.summary(made)))


@app.command()
def privacy(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run folder; all data sets if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Compute a run's epsilon again from what it spent, or list what all runs have spent on each data set."""
    from trivet import api

    rows = api.budgets() if run is None else api.epsilon_of(run)
    if rows or as_json:
        show(rows, as_json)
    else:
        print("no private run has spent anything yet; `trivet recipes` lists some, such as digits-dp-sgd.")


@app.command()
def compare(runs: RunsArgument, trust_code: Trust = False, as_json: Json = False) -> None:
    """Put audited runs side by side."""
    from trivet import api
    from trivet.audit.report import comparison

    rows = comparison(api.compare_runs(runs, trust_code=trust_code))
    show(rows, True) if as_json else show_models(rows)


@app.command()
def report(
    runs: RunsArgument,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="The page to write.")] = None,
    trust_code: Trust = False,
) -> None:
    """Write one self-contained HTML page about one or more audited runs."""
    from trivet import api

    print(api.write_report(runs, out, trust_code=trust_code))


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the runs and the report go.")] = "runs/demo",
    as_json: Json = False,
) -> None:
    """Train small networks on scikit-learn's digits in four ways, audit them all, and report: a few minutes."""
    from trivet import api
    from trivet.audit.report import comparison

    subjects, page = api.run_demo(out)
    if as_json:
        show_json(comparison(subjects))
        return
    show_models(comparison(subjects))
    print(f"report: {page}")


def _show_policy(subject: Any, as_json: bool) -> None:
    """What an audit of a policy found; status 1 where numbers contradict each other."""
    found = subject.findings
    if as_json:
        show_json(found.model_dump(mode="json"))
    else:
        clean = found.clean
        title = f"mean return by l_2 budget of an episode; without attack {clean.mean:.4g} ({clean.episodes} episodes)"
        show(found.rows(), False, title=title)
        for check in found.flags:
            print(f"{check.severity}: {check.title}: {check.meaning}")
        print(f"report: {found.source}/report.html")
    if any(check.severity == "error" for check in found.flags):
        raise typer.Exit(1)


def main(run: Callable[[], Any] = app) -> None:
    """The program: errors a user can mend become one sentence and exit status 2, an interrupt 130."""
    try:
        run()
    except TrivetError as error:
        print(f"trivet: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder one may not write
        print(f"trivet: {error.filename or 'the system'}: {error.strerror or error}.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("trivet: interrupted; what was saved stays, `trivet train … --resume` goes on.", file=sys.stderr)
        sys.exit(130)
