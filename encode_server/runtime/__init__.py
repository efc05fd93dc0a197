"""How processes and threads are run: forkserver, pools, links, listening, leaving."""
