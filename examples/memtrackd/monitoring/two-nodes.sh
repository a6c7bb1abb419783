#!/bin/bash
# SPDX-License-Identifier: MIT
#
# Two nodes in one machine: two daemons, a client of each, and a Prometheus that asks
# both, if there is one (PROMETHEUS=, or in the path). Shows what it sees of them, ends
# by itself, and leaves nothing behind.
#
#	two-nodes.sh [SECONDS]     how long to wait for the figures, at most
#
# PYTHON: an interpreter that has memtrackd.
set -euo pipefail

limit=${1:-60}
python=${PYTHON:-python3}
prometheus=${PROMETHEUS-$(type -P prometheus || true)}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
started=()

finish() {
	status=$?
	trap - EXIT
	# Only what was started here; each of them ends for SIGTERM.
	for pid in "${started[@]}"; do
		kill "$pid" 2>/dev/null || true
	done
	for pid in "${started[@]}"; do
		wait "$pid" 2>/dev/null || true
	done
	if ((status)); then
		tail -n 20 "$work"/*.log >&2 || true
	fi
	rm -rf "$work"
	exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() {
	local log=$1
	shift
	"$@" >"$work/$log.log" 2>&1 &
	started+=($!)
}

# Ports that nobody uses now.
read -r port1 port2 port3 < <("$python" - <<-'END'
	import socket

	sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
	print(*(s.getsockname()[1] for s in sockets))
	END
)

# A program whose buffer comes and goes.
cat >"$work/client.py" <<-'END'
	import mmap
	import sys
	import time

	import memtrackd

	with memtrackd.attach(sys.argv[1], required=False) as tracker:
	    while True:
	        with mmap.mmap(-1, 1 << 20) as buffer:
	            region = tracker.register(buffer, "buffer")
	            time.sleep(0.05)
	        # A report that was not read yet would go with its region.
	        time.sleep(0.05)
	        region.close()
END

node() {
	local name=$1 port=$2
	start "$name" "$python" -m memtrackd --socket "$work/$name.sock" \
		--http "127.0.0.1:$port" --canary 1
	MEMTRACKD_SOCKET=$work/$name.sock start "$name-client" \
		"$python" "$work/client.py" "program of $name"
	echo "$name: a daemon at 127.0.0.1:$port, and a client"
}

node node1 "$port1"
node node2 "$port2"

# As in production, but in a hurry.
sed 's/15s/1s/' "$here/prometheus.yml" >"$work/prometheus.yml"
cp "$here/rules.yml" "$work"
cat >"$work/nodes.yml" <<-END
	- targets: ["127.0.0.1:$port1"]
	  labels: {node: node1}
	- targets: ["127.0.0.1:$port2"]
	  labels: {node: node2}
END
if [[ $prometheus ]]; then
	start prometheus "$prometheus" --config.file="$work/prometheus.yml" \
		--storage.tsdb.path="$work/data" --web.listen-address="127.0.0.1:$port3"
	echo "prometheus: at 127.0.0.1:$port3, asks both"
else
	echo "prometheus: there is none, so the nodes are asked one by one"
	port3=
fi

"$python" - "$limit" "$port1" "$port2" "$port3" <<-'END'
	"""Wait until both nodes are up and have counted changes; print the figures."""

	import json
	import sys
	import time
	from urllib.parse import urlencode
	from urllib.request import urlopen

	limit, port1, port2, prometheus = sys.argv[1:]
	deadline = time.monotonic() + float(limit)
	CHANGES = "memtrackd_changes_total"


	def from_prometheus(expression):
	    query = urlencode({"query": f"sum by (node) ({expression})"})
	    url = f"http://127.0.0.1:{prometheus}/api/v1/query?{query}"
	    with urlopen(url, timeout=5) as answer:
	        found = json.load(answer)["data"]["result"]
	    return {row["metric"]["node"]: float(row["value"][1]) for row in found}


	def from_node(port):
	    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
	        lines = answer.read().decode().splitlines()
	    return sum(float(line.split()[-1]) for line in lines if line.startswith(CHANGES))


	def figures():
	    if prometheus:
	        up, changes = from_prometheus("up"), from_prometheus(CHANGES)
	    else:
	        changes = {"node1": from_node(port1), "node2": from_node(port2)}
	        up = dict.fromkeys(changes, 1.0)
	    return {n: (up.get(n, 0), changes.get(n, 0)) for n in ("node1", "node2")}


	seen, trouble = {}, "nothing has answered"
	while not seen or not all(up and changes for up, changes in seen.values()):
	    if time.monotonic() > deadline:
	        sys.exit(f"not within {limit} s: {seen or trouble}")
	    time.sleep(0.5)
	    try:
	        seen = figures()
	    except OSError as error:
	        trouble = error
	for name, (up, changes) in seen.items():
	    print(f'up{{node="{name}"}} {up:.0f}')
	    print(f'{CHANGES}{{node="{name}"}} {changes:.0f}')
END
echo "two-nodes: ok"
