"""What can make a process hang that watches its own mappings.

Each scenario is a function that runs in a process of its own, so that a hang becomes
a failure: ``python -m tests.hangs gil.in_a_loop asyncio poll``. (HANGS_NATIVE names
the library made of ``native.c``, for those that need it.) The modules, by what makes
the trouble:

- ``gil``: memory is unmapped by a thread that holds the GIL
- ``heap``: malloc() gives memory back
- ``signals``: a handler unmaps
- ``forks``: processes that share the descriptors, or the memory
- ``closing``: notifiers end while memory changes, in finalizers, by the thousand
- ``ends``: the process ends, or an interpreter in it
- ``descriptors``: somebody closes the engine's descriptors
- ``load``: nobody reads what is reported
- ``contract``: nothing, but the user is nobody
- ``naive``: the controls, readers without the engine's care, which do hang

``native.c`` has what cannot be done in Python; ``runner`` is the test's side, ``child``
has what the scenarios share.
"""
