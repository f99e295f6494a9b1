"""`python -m pytest lesson` says one line per exercise in place of pytest's own report, which -v brings back."""
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(trylast=True)                                   # the report that it replaces is there by then
def pytest_configure(config):
    asked = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    ours = all(HERE in (path, *path.parents) for path in asked)
    if ours and not (config.option.verbose > 0 or config.option.usepdb or config.option.collectonly):
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(Lines())


def short(name):
    """What a test is called on the screen: "budget_at" or "bug 3"."""
    test, _, which = name.removeprefix("test_").rstrip("]").partition("[")
    return which if test == "exercise" else f"{test} {which}"


class Lines:
    """A test's line: its name, and the first line of what its exception says."""

    def __init__(self):
        self.right = self.count = 0
        self.running = self.interrupted = None

    def pytest_runtest_logstart(self, location):
        self.running = short(location[2])

    def pytest_keyboard_interrupt(self):
        self.interrupted = f"interrupted in {self.running or 'the search for tests'}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        said = str(call.excinfo.value) if call.excinfo else "right"
        report.line = f"{short(item.name):<18}  {said.partition(chr(10))[0]}"
        return report

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.count, self.right = self.count + 1, self.right + report.passed
            print(report.line, flush=True)

    def pytest_collectreport(self, report):
        if report.failed:
            print(f"{report.nodeid}: {report.longreprtext.splitlines()[-1]}", flush=True)

    def pytest_sessionfinish(self):
        counted = f"{self.right} of {self.count} right" if self.count else "no exercise has such a name"
        print(self.interrupted or counted)
