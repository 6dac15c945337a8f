"""Reward models that learn beside a run, and the scorers that serve them.

    copies of groups --> Inbox --> OnlineLoop (threads) --> OnlineTrainer.learn --> a version --> cluster/online.py
                         bounded    updates a step bound                                             flips a pointer
    scorers.py: before each batch, takes up the version that the pointer names

inbox.py the bounded queue; loop.py the threads; trainer.py what a trainer is; references.py reference images; heads.py
small heads; adversarial.py, guarded.py, distilled.py the trainers; labels.py what a judge has said; following.py and
scorers.py the serving side.
Does not own: files of a version (contracts/versions.py), when a version is used (cluster/online.py).
"""
