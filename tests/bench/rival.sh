#!/bin/sh
# rival.sh KUBECTL KUBECONFIG INTERFACE: what one would write in an evening instead of epok, and not a bad one: it reads
# the cluster once, and replaces its chain with one iptables-restore, only when something differs. It knows tcp,
# "25:2025" and IPv4, and a rule for each port and node, in a row.
set -eu
kubectl=$1 kubeconfig=$2 interface=$3
new=$(mktemp) old=$(mktemp)
trap 'rm -f "$new" "$old"' EXIT

"$kubectl" --kubeconfig "$kubeconfig" get services,nodes -A -o json | jq -r --arg interface "$interface" '
  [.items[] | select(.kind == "Node" and any(.status.conditions[]; .type == "Ready" and .status == "True"))
    | .status.addresses[] | select(.type == "InternalIP" and (.address | contains(":") | not)) | .address] as $nodes
  | .items[] | select(.kind == "Service") | .metadata as $meta
  | ($meta.annotations["getbetter.ro/externalport"] // empty) | split(",")[] | split(":") as [$external, $port]
  | $nodes | to_entries[] | (($nodes | length) - .key) as $left
  | "-A RIVAL -i \($interface) -p tcp -m tcp --dport \($external) -m comment --comment \"\($meta.namespace)/\($meta.name)\""
    + (if $left > 1 then " -m statistic --mode nth --every \($left) --packet 0" else "" end)
    + " -j DNAT --to-destination \(.value):\($port)"' >"$new"

for table in nat filter; do iptables-save -t $table; done >"$old"
hook() {
    # shellcheck disable=SC2086 # the words of a rule
    grep -qxe "-A $2" "$old" || iptables -w 5 -t "$1" -A $2
}
if ! grep '^-A RIVAL ' "$old" | cmp -s - "$new"; then
    { printf '*nat\n:RIVAL - [0:0]\n'; cat "$new"; echo COMMIT; } | iptables-restore --noflush --wait 5
    echo changed
fi
hook nat "PREROUTING -m addrtype --dst-type LOCAL -j RIVAL"
hook nat "POSTROUTING -m conntrack --ctstate DNAT -j MASQUERADE"
hook filter "FORWARD -m conntrack --ctstate DNAT -j ACCEPT"
