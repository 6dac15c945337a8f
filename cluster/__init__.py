"""The roof: command line, controller, ledger and vaults, scoring, weight store, evaluation, telemetry. Ray lives here.

Start reading at controller.py (the run), inprocess.py (the same run without Ray, HTTP or queue), workers.py (who
runs in which process).
"""
