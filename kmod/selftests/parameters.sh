#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Tests with module parameters that can only be given when it is loaded.
#
#   parameters.sh MODULE     in a guest, as root, with no ummunotify loaded
#
# Prints TAP, as run.sh does.

cd "$(dirname "$0")" || exit 1

failed=0 number=0
echo "TAP version 13"
echo "1..2"
for value in Y N; do
	number=$((number + 1))
	insmod "$1" report_foreign=$value || exit 1
	output=$(./foreign_test)
	status=$?
	echo "$output" | sed 's/^/# /'
	if [ $status -eq 0 ]; then
		echo "ok $number report_foreign=$value"
	else
		echo "not ok $number report_foreign=$value"
		failed=$((failed + 1))
	fi
	rmmod ummunotify || exit 1
done
[ $failed -eq 0 ]
