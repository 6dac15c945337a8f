"""What a run did, for people: report.html, the terminal's status, the way of each group.

view.py a run folder read whole, whatever is missing; samples.py images of evaluations; faults.py which events are
faults; panels.py, plots.py, page.py and page.html.j2 the page; end.py the page when a run ends.
Reads run folders only: nothing here asks a process of the run.
"""
