"""The command line: `train | agent | validate | plan | compare | study FILE.yaml [key=value …]`, `status FOLDER`, …

Sub-commands import what they need when they run, so `--help` answers at once. A user's mistake is one line on stderr
and exit code 2; whatever else goes wrong keeps its traceback, because it is ours to mend.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from elastic_lsopt import __version__
from elastic_lsopt.cli.probe import arguments_of
from elastic_lsopt.cli.simulate import refuse_without_simulate, simulate, simulation_options
from elastic_lsopt.errors import UserError

FROM_A_RUN = "run the code that names the model, also where the file is a run's own settings"
TRUST = {
    "train": FROM_A_RUN, "agent": FROM_A_RUN, "validate": "import the code that names the model, to know its size",
    "plan": "import the code that the file names, to know its size",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a mistake of the user's, 130 after an interrupt."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = command_line().parse_args(given)
    if "" not in sys.path:
        sys.path.insert(0, "")  # a model's import path counts from the working directory, as under `python -m`
    try:
        return _run(arguments, given)
    except UserError as error:
        print(f"elastic-lsopt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("elastic-lsopt: interrupted.", file=sys.stderr)
        return 130
    except OSError as error:
        if error is not getattr(sys.stdout, "lost", None):
            raise
        return 1  # `end` says why


def command(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process of its own: the door by which every command leaves."""
    from elastic_lsopt.backends.fabric.ending import end
    from elastic_lsopt.cli.terminal.output import Output

    sys.stdout = Output(sys.stdout)  # type: ignore[assignment]
    end(main(argv))


def _run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    match arguments.command:
        case "train":
            from elastic_lsopt.cli.train import train

            return train(arguments.file, arguments.overrides, trust=arguments.trust)
        case "agent":
            from elastic_lsopt.cli.train import agent

            return agent(arguments.file, arguments.overrides, trust=arguments.trust)
        case "validate":
            from elastic_lsopt.cli.validate import validate

            return validate(arguments.file, arguments.overrides, trust=arguments.trust)
        case "plan":
            if arguments.simulate:
                return simulate(arguments.file, arguments.overrides, arguments)
            refuse_without_simulate(arguments)
            from elastic_lsopt.cli.plan_job import Asked, plan_job

            asked = Asked(
                worlds=arguments.worlds, gpu_memory=arguments.gpu_memory, as_json=arguments.json,
                tokens_per_second=arguments.tokens_per_second, price_per_hour=arguments.price_per_hour,
                trust=arguments.trust,
            )  # fmt: skip
            return plan_job(arguments.file, arguments.overrides, asked)
        case "study":
            from elastic_lsopt.cli.study import study

            return study(arguments.file, arguments.overrides)
        case "compare":
            from elastic_lsopt.cli.compare import compare

            return compare(arguments.file, arguments.overrides)
        case "methods":
            from elastic_lsopt.cli.methods import methods

            return methods(arguments.name, as_json=arguments.json)
        case "status":
            from elastic_lsopt.cli.status import status

            return status(
                arguments.run_folder, endpoint=arguments.endpoint, secret_file=arguments.secret_file,
                once=arguments.once,
            )  # fmt: skip
        case "probe":
            from elastic_lsopt.cli.probe import probe

            return probe(arguments, given[1:])
        case "doctor":
            from elastic_lsopt.cli.doctor.doctor import Asked as AskedOfDoctor
            from elastic_lsopt.cli.doctor.doctor import doctor

            looked_for = AskedOfDoctor(
                hostfile=arguments.hostfile, store=arguments.store, output_dir=arguments.output_dir, gpu=arguments.gpu,
                as_json=arguments.json,
            )  # fmt: skip
            return doctor(looked_for)
        case "runs":
            from elastic_lsopt.cli.runs import runs

            return runs(arguments.folders, as_json=arguments.json)
        case "report":
            from elastic_lsopt.cli.report import report

            return report(arguments.run_folder)
        case _:
            from elastic_lsopt.config.pages.schema import schema_text

            print(schema_text(), end="")
            return 0


def command_line() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="elastic-lsopt", description="Landscape-aware optimizers on sharded parameters, one YAML file a job."
    )
    parser.add_argument("--version", action="version", version=f"elastic-lsopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in (
        ("train", "run a job; starts its own workers where no launcher did"),
        ("agent", "be this node's agent in an elastic job: start, feed and fence its workers, and vote"),
        ("validate", "check a file; print the batch arithmetic and the memory per rank, without a GPU"),
        ("plan", "memory, batch, communication, time and price on each world size, before the job runs"),
        ("compare", "methods x seeds on one task: tune each, run in parallel, print means with intervals"),
        ("study", "train a grid of small networks; rank flatness measures by Kendall's tau with the gap"),
    ):
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("file", metavar="FILE.yaml", help="the job")
        command.add_argument(
            "overrides", metavar="key=value", nargs="*", help="laid over the file, such as landscape.rho=0.1"
        )
        if why := TRUST.get(name):
            command.add_argument("--trust", action="store_true", help=why)
        if name == "plan":
            _plan_options(command)
    purpose = "every method, update, average and rule of consensus: what it costs, what it needs, where it is tested"
    catalogue = commands.add_parser("methods", help=purpose, description=purpose)
    catalogue.add_argument("name", metavar="NAME", nargs="?", help="show this one in full: recurrence, fields, example")
    catalogue.add_argument("--json", action="store_true", help="print a JSON list")
    purpose = "members, generation, throughput and last changes of an elastic job"
    live = commands.add_parser("status", help=purpose, description=purpose)
    live.add_argument("run_folder", metavar="RUN_FOLDER", help="the job's output_dir")
    live.add_argument("--endpoint", metavar="HOST:PORT", help="any living node's store (default: of the run folder)")
    live.add_argument("--secret-file", metavar="FILE", help="as in the job's elastic block")
    live.add_argument("--once", action="store_true", help="print once, also on a terminal")
    purpose = "draw a run: one HTML page that needs no network, and its pictures"
    drawn = commands.add_parser("report", help=purpose, description=purpose)
    drawn.add_argument(
        "run_folder", metavar="RUN_FOLDER", help="a job's output_dir, or the folder of a probe, study or comparison"
    )
    purpose = "is this machine, and are its hosts, ready for a job; what to fix"
    looks = commands.add_parser("doctor", help=purpose, description=purpose)
    looks.add_argument("--hostfile", metavar="FILE", help="reach each of its hosts by ssh, and compare clocks")
    looks.add_argument("--store", metavar="HOST:PORT", help="of the first node's agent, or etcd://host:port")
    looks.add_argument("--output-dir", metavar="FOLDER", default=".", help="where runs will write (default: here)")
    looks.add_argument("--gpu", action="store_true", help="a GPU must be there")
    looks.add_argument("--json", action="store_true", help="print one JSON object")
    purpose = "list the runs of a folder, or compare some: runs [FOLDER], runs compare RUN RUN …"
    listed = commands.add_parser("runs", help=purpose, description=purpose)
    listed.add_argument(
        "folders", metavar="FOLDER", nargs="*", help="where runs lie (default: runs), or compare and runs"
    )
    listed.add_argument("--json", action="store_true", help="print one JSON object")
    purpose = "curvature and flatness of a finished model"
    arguments_of(commands.add_parser("probe", help=purpose, description=purpose))
    purpose = "print the JSON schema of a job's YAML, for editors"
    commands.add_parser("schema", help=purpose, description=purpose)
    return parser


def _plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--worlds", metavar="N,N,…", help="numbers of ranks (default: powers of two)")
    command.add_argument(
        "--gpu-memory", metavar="SIZE", help="of one GPU, such as 80GiB: from how many ranks on it fits"
    )
    command.add_argument(
        "--tokens-per-second", type=float, metavar="N", help="of one rank, forward and backward of a pass: gives hours"
    )
    command.add_argument("--price-per-hour", type=float, metavar="N", help="of one rank; gives the job's price")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    simulation_options(command)


if __name__ == "__main__":
    command()
