#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Do the tests fail where the driver is wrong?  Broken copies of it, each with the
# tests that must notice.
#
#   mutants.sh make DIR KDIR [NAME...]   write and build the copies, below DIR
#   mutants.sh run DIR [NAME...]         in a guest, as root, with no ummunotify
#                                        loaded: load each, and run its tests
#   mutants.sh list                      names, programs and tests
#
# UMMUNOTIFY_HOLD is a module that some of the tests need: see run.sh.
#
# "run" prints TAP: a mutant that passes its tests is "not ok".

cd "$(dirname "$0")" || exit 1

# name | program | tests that must fail | sed script
mutants() {
	cat <<'END'
no_end|stale_window_test|a_drained_report_leaves_no_stale_window a_registration_in_between_is_never_stale a_second_registration_in_between_is_told_of_the_end|/^\t\.invalidate_range_end\t*=/d
no_start|stale_window_test|nothing_is_gone_before_the_counter_rises|/^\t\.invalidate_range_start\t*=/d
no_release|lifetime_test|the_end_without_regions_is_end_of_file|/^\t\.release\t*= ummunotify_mm_release,/d
end_forgets_readers|stale_window_test|a_drained_report_leaves_no_stale_window|/^static size_t ummunotify_commit/,/^}/s/^\tummunotify_unsettle(ctx);//
end_forgets_registrations|stale_window_test|a_second_registration_in_between_is_told_of_the_end|/^static int ummunotify_insert/,/^}/s/^\t\tummunotify_unsettle(ctx);//
end_of_file_too_early|lifetime_test|the_end_of_file_follows_all_reports pollhup_follows_all_reports|/^static void ummunotify_mm_release/,/^}/s/^\tctx->ended = true;/\tctx->ended = ctx->final = true;/
no_last_after_unregister|behaviour_test|last_comes_after_unregister_of_the_last_pending|/^static long ummunotify_unregister/,/^}/s/ctx->last_due = true;//
no_last|behaviour_test|last_comes_alone_if_there_was_no_room|/^static size_t ummunotify_commit/,/^}/s/ctx->last_due = true;//
hint_stays|behaviour_test|a_second_hit_clears_the_hint|s/^\tregion->report &= ~REPORT_HINT;//
hint_is_not_clipped|behaviour_test|the_hint_is_clipped_to_the_region|/^static void ummunotify_report/,/^}/s/max(walk->start, region->start)/walk->start/
one_raise_per_region|behaviour_test|a_hit_on_many_regions_raises_the_counter_once|/^static void ummunotify_hit/,/^}/s/^\twalk->raised = true;//
no_raise_if_pending|behaviour_test|a_second_hit_clears_the_hint|/^static void ummunotify_report/,/^}/s/^\t\tummunotify_hit(walk);$/\t\tif (!(region->report \& REPORT_PENDING))\n\t\t\tummunotify_hit(walk);/
no_raise_behind_last|race_test|a_last_in_the_middle_of_a_change_is_not_its_last|s/^\tif (walk->raised && ctx->generation != ctx->told_generation)/\tif (walk->raised)/
walk_stops_after_a_batch|behaviour_test|many_overlapping_regions_all_report_for_one|/^static void ummunotify_walk/,/^}/s/^\t\t\traw_spin_lock(&ctx->lock);/&\n\t\t\tbreak;/
fault_loses_reports|behaviour_test|a_read_that_faults_loses_nothing a_half_mapped_buffer_loses_nothing|/^static ssize_t ummunotify_deliver/,/^}/s/^\t\t\tummunotify_unpeek(ctx);/\t\t\tummunotify_commit(ctx, n);/
changed_while_peeked|behaviour_test|a_hit_while_a_reader_copies_is_reported_again|s/^\t\tregion->report |= REPORT_CHANGED;//
short_read_is_zero|behaviour_test|a_read_of_three_bytes_is_einval|/^static ssize_t ummunotify_read/,/^}/s/^\t\treturn -EINVAL;/\t\treturn 0;/
inverted_is_accepted|abi_test|an_inverted_range_is_einval|s/^\tif (start > end || end > ULONG_MAX)/\tif (end > ULONG_MAX)/
empty_reports|abi_test|an_empty_range_never_reports|s/^\tif (region->last + 1 != region->start) {/\tif (1) {/
flags_are_looked_at|abi_test|garbage_in_flags_is_ignored|s|^\tif (features) {|\tif (true) {\n\t\tfeatures = UMMUNOTIFY_FEATURE_FILTER;|
close_leaves_the_counter|lifetime_test|a_kept_counter_reads_changed_after_close|/^static int ummunotify_release/,/^}/s/^\tummunotify_raise_generation(ctx);//
no_limit|limits_test|past_max_regions_is_enospc|s/^\tif (ctx->nr_regions >= READ_ONCE(max_regions))/\tif (0)/
not_accounted|limits_test|regions_are_charged_to_the_memory_cgroup|s/KMEM_CACHE(ummunotify_region, SLAB_ACCOUNT)/KMEM_CACHE(ummunotify_region, 0)/
causes_are_lost|behaviour_test|a_report_has_the_causes_of_all_it_reports|s/^\tregion->report |= walk->causes;//
causes_are_told_to_all|behaviour_test|causes_belong_to_the_fd_that_asked|s/^\tu32 told = ctx->features & UMMUNOTIFY_FEATURE_CAUSE ? REPORT_CAUSES : 0;/\tu32 told = REPORT_CAUSES;/;s/^\tif (tracker || READ_ONCE/\tif (true || READ_ONCE/
the_end_has_no_cause|lifetime_test|the_end_is_a_cause|s/^\t\t\.causes\t\t= UMMUNOTIFY_EVENT_CAUSE_END,//
nobody_is_foreign|behaviour_test|what_others_do_is_foreign|s/^\t\tcauses |= UMMUNOTIFY_EVENT_CAUSE_FOREIGN;/\t\t;/
nowait_waits|race_test|a_reader_stuck_in_a_fault_delays_nobody|s/^\tif (nowait)$/\tif (0)/
nowait_waits_for_reports|wait_test|rwf_nowait_never_waits_whatever_others_set|s/^\t\tif (nowait || iocb->ki_filp/\t\tif (iocb->ki_filp/
wakes_nobody|wait_test|a_blocking_read_waits_for_a_report epoll_by_edge_comes_once_per_report|s/^\t\twalk->wake = true;//
no_signals|wait_test|f_setsig_tells_fd_and_band|s/^\t*kill_fasync(&ctx->fasync, SIGIO, POLL_IN);/;/
filters_are_ignored|features_test|each_region_has_its_own_causes|s/^\tif (!(region->reasons & walk->reasons))$/\tif (0)/
filters_stay_behind|features_test|filters_come_and_go_with_their_regions|/^static int ummunotify_insert/,/^}/s/ctx->reasons | region->reasons);$/ctx->reasons ? ctx->reasons : region->reasons);/
a_filter_hides_the_end|features_test|the_end_is_told_to_all|s/^\t\t\.reasons\t= REASONS_ALL,/\t\t.reasons\t= REASONS(UMMUNOTIFY_EVENT_CAUSE_UNMAP),/
moves_are_not_unmappings|features_test|who_asks_for_moves_is_told_of_unmapping|s/^\t\tcauses |= UMMUNOTIFY_EVENT_CAUSE_UNMAP;/\t\t;/
unknown_flags_are_accepted|features_test|what_was_not_negotiated_is_einval|s/^\t\tif (parm->flags & ~known)/\t\tif (0)/
garbage_is_a_filter|features_test|garbage_without_filters_filters_nothing|s/^\tif (known) {/\tif (true) {\n\t\tknown = ~0;/
once_is_for_ever|features_test|a_one_shot_region_reports_once_and_is_gone|s/^\t\t\tif (region->once) {/\t\t\tif (0) {/
once_ends_with_the_change|features_test|a_one_shot_region_coalesces_until_it_is_read|/^static void ummunotify_visit/,/^}/s/^\twalk->hits++;/\twalk->hits++;\n\tif (region->once \&\& region->report)\n\t\treturn;/
once_outlives_a_change|features_test|a_one_shot_region_ends_with_its_report|s/ && !region->once) {/) {/
empty_regions_are_busy|state_test|an_empty_region_is_idle|/^static u16 ummunotify_busy/,/^}/s/^\tif (region->last + 1 == region->start)/\tif (0)/
states_never_change|state_test|each_change_of_the_region_changes_its_state|s/^\tif (region->slot)$/\tif (0)/
the_filtered_count|state_test|what_is_filtered_out_does_not_change_the_state|/^static void ummunotify_visit/,/^}/s/^\tif (!(region->reasons/\tif (region->slot)\n\t\tummunotify_update_state(walk, region);\n\tif (!(region->reasons/
never_busy|state_test|the_state_is_busy_while_a_change_is_under_way|/^static void ummunotify_count_state/,/^}/s/ + 1 + busy);/ + 1);/
busy_until_the_first_end|state_test|overlapping_changes_are_over_with_the_last_of_them|s/^\t} else if (!--region->busy) {/\t} else {\n\t\tregion->busy = 0;/
newcomers_look_idle|state_test|a_region_registered_meanwhile_is_busy_until_the_end|s/^\tregion->busy = ummunotify_busy(ctx->tracker, region);/\tregion->busy = 0;/
newcomers_are_counted_twice|state_test|newcomers_in_the_middle_of_a_change_settle|/^static void ummunotify_walk(/,/^}/s/^\twalk->serial = ctx->serial;/\twalk->serial = ctx->serial + 0x40000000;/
the_crowd_is_forgotten|state_test|a_crowd_of_changes_never_looks_idle|s/^\tif (tracker->nr_unknown)$/\tif (0)/
flights_never_land|state_test|a_region_registered_meanwhile_is_busy_until_the_end|/^static void ummunotify_land/,/^}/s/^\t\ttracker->nr_flights--;/\t\t;/
free_slots_look_idle|state_test|a_free_slot_is_busy|/^static void ummunotify_leave_slot/,/^}/s/^\tummunotify_count_state.*//
a_slot_for_two|state_test|a_slot_has_one_region|s/^\tif (region->slot && ummunotify_slot_is_used(ctx, region->slot))/\tif (0)/
slots_beyond_the_area|state_test|a_slot_has_one_region|s/^\tif (!states || index >= states->nr_pages)/\tif (!states || index > states->nr_pages)/
close_leaves_the_states|state_test|a_kept_area_is_busy_after_close|s/^\tummunotify_finish_states(ctx);//
the_end_looks_idle|state_test|the_end_of_the_process_is_a_change_for_ever|/^static void ummunotify_update_state/,/^}/s/^\t\tregion->busy = BUSY_FOREVER;/\t\treturn;/
nothing_is_traced|trace_test|each_step_has_its_tracepoint|s/^\ttrace_ummunotify_invalidate(ctx, walk->start.*/\tif (0)\n\t&/
write_is_allowed|abi_test|open_for_writing_is_refused|s/^\tif (file->f_mode & FMODE_WRITE || !current->mm)/\tif (!current->mm)/
END
}

# Is $1 among the other arguments, or are there none?
wanted() {
	name=$1
	shift
	[ $# -eq 0 ] && return 0
	for other; do
		[ "$other" = "$name" ] && return 0
	done
	return 1
}

make_mutants() {
	out=$1 kdir=$2
	shift 2
	tab=$(printf '\t')
	mutants | while IFS='|' read -r name program tests script; do
		wanted "$name" "$@" || continue
		rm -rf "${out:?}/$name"
		mkdir -p "$out/$name" || exit 1
		cp -r ../Kbuild ../Makefile ../include ../*.c ../*.h "$out/$name" ||
			exit 1
		sed "$script" ../ummunotify.c >"$out/$name/ummunotify.c" || exit 1
		if cmp -s ../ummunotify.c "$out/$name/ummunotify.c"; then
			echo "mutant $name: its sed script matches nothing" >&2
			exit 1
		fi
		# What a mutant leaves unused is meant to be.
		if ! make -s -C "$out/$name" KDIR="$kdir" \
			KCFLAGS="-Wno-unused -Wno-unused-function" \
			>"$out/$name/make.log" 2>&1; then
			cat "$out/$name/make.log" >&2
			echo "mutant $name does not build" >&2
			exit 1
		fi
		echo "mutant $name"
	done
}

run_mutants() {
	out=$1
	shift
	failed=0 number=0 planned=0
	log=$(mktemp) || exit 1
	names=$(mutants | cut -d'|' -f1)
	[ -z "$UMMUNOTIFY_HOLD" ] || insmod "$UMMUNOTIFY_HOLD" || exit 1
	for name in $names; do
		wanted "$name" "$@" && planned=$((planned + 1))
	done
	echo "TAP version 13"
	echo "1..$planned"
	for name in $names; do
		wanted "$name" "$@" || continue
		number=$((number + 1))
		program=$(mutants | grep "^$name|" | cut -d'|' -f2)
		tests=$(mutants | grep "^$name|" | cut -d'|' -f3)
		insmod "$out/$name/ummunotify.ko" || exit 1
		survived=
		for test in $tests; do
			UMMUNOTIFY_TEST_LIMIT=${UMMUNOTIFY_TEST_LIMIT:-30} \
				./"$program" "$test" >"$log"
			sed 's/^/# /' "$log"
			grep -q "^not ok 1 $test" "$log" ||
				survived="$survived $test"
		done
		rmmod ummunotify || exit 1
		if [ -n "$survived" ]; then
			echo "# not noticed by:$survived"
			echo "not ok $number $name"
			failed=$((failed + 1))
		else
			echo "ok $number $name"
		fi
	done
	rm -f "$log"
	[ -z "$UMMUNOTIFY_HOLD" ] || rmmod ummunotify_hold
	echo "# Totals: pass:$((number - failed)) fail:$failed skip:0"
	[ $failed -eq 0 ]
}

case $1 in
make) shift; make_mutants "$@" ;;
run) shift; run_mutants "$@" ;;
list) mutants | cut -d'|' -f1-3 ;;
*) sed -n '4,13s/^# \{0,1\}//p' "$0"; exit 1 ;;
esac
