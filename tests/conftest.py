"""What concerns every test run: the line on simulated lives at its end."""

from __future__ import annotations


def pytest_terminal_summary(terminalreporter):
    """Add up what the simulation's tests report, from whichever worker they ran on."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    lives = [dict(r.user_properties) for r in reports if r.when == "call"]
    lives = [properties for properties in lives if "simulated_seeds" in properties]
    if lives:
        seeds = sum(properties["simulated_seeds"] for properties in lives)
        seconds = sum(properties["cpu_seconds"] for properties in lives)
        terminalreporter.write_line(
            f"simulation: {seeds:,} seeds in {seconds:.1f} s of CPU, "
            f"{seeds / seconds:,.0f} seeds/s on one core"
        )
