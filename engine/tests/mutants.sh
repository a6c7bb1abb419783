#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Do the tests fail where the engine is wrong?  Broken copies of it, each with the
# test that must notice: named tests, each of which must be "not ok", or a stress
# run, which must end otherwise than with 0.  A hang counts, at its time limit.
#
#   mutants.sh DIR [NAME...]   build them below DIR/mutants, and run the tests
#   mutants.sh list            names and tests

cd "$(dirname "$0")" || exit 1

# name | file | program | its arguments | sed script
mutants() {
	cat <<'END'
begun_after_the_read|engine.c|stress|--seconds 30 --patience 6|/^static bool read_event/,/^}/{/atomic_store(&page->begun/d; s/^\terror = length < 0.*/\tatomic_store(\&page->begun, number + 1);\n&/}
finished_before_the_ring|engine.c|stress|--seconds 30 --patience 6|/^static bool read_event/,/^}/{/atomic_store(&engine.finished/d; s/^\tif (length == sizeof(message))/\tatomic_store(\&engine.finished, number + 1);\n&/}
nobody_waits_for_the_ring|engine.c|stress|--seconds 30 --patience 6|/^static void settle/,/^}/s/atomic_load(&engine.finished) < begun/0 \&\& &/
nothing_looked_for_after_unlocking|engine.c|engine_test|whoever_has_the_lock_reports_what_came_meanwhile|/^static void let_go/,/^}/s/^\t\tif (ring_is_empty() ||.*/\t\tif (1)/
an_overrun_is_not_noticed|engine.c|engine_test|an_overrun_reports_everything after_an_overrun_everything_can_be_watched_again|/^static void put(/,/^}/s/^\t\tatomic_store(&engine.overrun, true);//
an_overrun_forgets_no_mapping|engine.c|engine_test|after_an_overrun_what_was_moved_is_released|/^static void invalidate_everything/,/^}/s/^\tforget(.*//
an_overrun_is_exact|engine.c|engine_test|an_overrun_reports_everything|/^static void invalidate_everything/,/^}/s/^\tranges_visit(.*//
the_thread_waits_for_the_lock|engine.c|engine_test|a_full_ring_loses_nothing|/^static void \*run/,/^}/s/pthread_mutex_trylock/pthread_mutex_lock/
the_thread_waits_for_the_lock_too|engine.c|stress|--seconds 30 --patience 6|/^static void \*run/,/^}/s/pthread_mutex_trylock/pthread_mutex_lock/
the_thread_takes_signals|engine.c|engine_test|the_engines_thread_takes_no_signals|/^static int start_thread/,/^}/s/sigfillset(&all)/sigemptyset(\&all)/
the_thread_applies_nothing|engine.c|engine_test|the_doorbell_rings_without_being_asked|/^static void \*run/,/^}/s/if (!ring_is_empty() \&\&/if (0 \&\&/
close_unregisters_nothing|engine.c|engine_test|a_child_with_a_copy_does_not_keep_anything_registered|/^static void unregister_mappings/,/^}/s/^\t\tioctl(engine.userfaultfd.fd, UFFDIO_UNREGISTER.*//
only_a_part_is_registered|engine.c|engine_test|watching_a_part_leaves_the_mapping_whole|/^static int cover(/,/^}/s/^\t\tif (known && known->range.start == mapping.start.*/\t\tmapping.start = start \& -4096;\n\t\tif (mapping.end > end)\n\t\t\tmapping.end = (end + 4095) \& -4096;\n&/
only_a_part_is_registered_too|engine.c|stress|--seconds 30 --patience 6|/^static int cover(/,/^}/s/^\t\tif (known && known->range.start == mapping.start.*/\t\tmapping.start = start \& -4096;\n\t\tif (mapping.end > end)\n\t\t\tmapping.end = (end + 4095) \& -4096;\n&/
known_coverage_is_trusted|engine.c|engine_test|a_segment_attached_again_is_watched_once_registered|/^static int cover(/,/^}/s/^\t\t    !register_range(mapping.start, mapping.end)) {/\t\t    mapping.end) {/
known_coverage_is_trusted_too|engine.c|stress|--seconds 60 --patience 6|/^static int cover(/,/^}/s/^\t\t    !register_range(mapping.start, mapping.end)) {/\t\t    mapping.end) {/
an_event_is_taken_for_new|engine.c|engine_test|a_late_event_does_not_make_a_registration_forgotten|/^static void apply/,/^}/s/^\t\tdoubt_cover(/\t\tremove_cover(/
a_move_is_not_followed|engine.c|engine_test|a_mapping_that_is_watched_in_part_can_move|/^static void apply/,/^}/s/^\t\tadd_cover(.*//
a_move_is_not_followed_too|engine.c|stress|--seconds 30 --patience 6|/^static void apply/,/^}/s/^\t\tadd_cover(.*//
a_move_changes_nothing|engine.c|stress|--seconds 30 --patience 6|/^static void put_event/,/^}/s/^\t\tchange.start = message->arg.remap.from;/\t\tchange.start = message->arg.remap.to;/
the_hint_stays|engine.c|engine_test|a_second_hit_before_the_read_takes_the_hint_away|/^static void hit/,/^}/s/^\t\tregion->exact = false;//
the_hint_stays_too|engine.c|stress|--seconds 30 --patience 6|/^static void hit/,/^}/s/^\t\tregion->exact = false;//
the_hint_is_not_clipped|engine.c|engine_test|an_unmapping_is_reported_exactly|/^static void hit/,/^}/s/^\tregion->hint_start = .*/\tregion->hint_start = change->start; (void)(0 ? 0 :/; /^static void hit/,/^}/s/^\t\t\t\t\t\t\t    range->start;/\t\trange->start);/
the_generation_counts_regions|engine.c|engine_test|a_change_counts_once_however_many_regions_it_hits|/^static void hit/,/^}/s/notifier->last_change != engine.change_number/1/
a_pending_region_does_not_count|engine.c|engine_test|a_second_hit_before_the_read_takes_the_hint_away|/^static void hit/,/^}/s/notifier->last_change != engine.change_number/!region->pending \&\& &/
a_region_is_never_spent|engine.c|engine_test|a_spent_region_stays_so_until_it_is_rearmed|/^static void hit/,/^}/s/region->spent = true/region->spent = false/
last_comes_too_early|engine.c|engine_test|last_waits_for_room|/^static size_t take_reports/,/^}/s/if (count < room && notifier->last_due)/if (count <= room \&\& notifier->last_due)/
last_comes_before_the_reports|engine.c|stress|--seconds 30 --patience 6|/^static size_t take_reports/,/^}/s/while (count < room \&\& (region/while (count < 1 \&\& (region/
last_is_lost_with_the_region|engine.c|engine_test|last_comes_after_unregister_of_the_last_pending|/^static void remove_region/,/^}/s/^\t\tdrop_report(region);/\t\tdrop_report(region), quiet_doorbell(region->notifier);/
reports_survive_unregistering|engine.c|engine_test|an_unregistered_region_is_not_reported|/^static void remove_region/,/^}/s/^\tif (region->pending)/\tif (0)/
the_fence_does_not_wait|engine.c|stress|--seconds 60 --patience 6|/^static bool is_anything_under_way/,/^}/s/errno == EAGAIN/errno == EDOM/
what_is_being_registered_is_idle|engine.c|engine_test|what_is_being_registered_is_not_idle|/^static int add_region/,/^}/s/^\terror = cover(.*/\tranges_remove(\&engine.regions, \&region->range);\n&\n\tranges_insert(\&engine.regions, \&region->range);/
the_idle_stay|engine.c|engine_test|idle_mappings_are_released_beyond_the_limit|s/^\twhile (engine.idle_count > IDLE_LIMIT)/\twhile (0 \&\& engine.idle_count > IDLE_LIMIT)/
the_wanted_are_released|engine.c|stress|--seconds 30 --patience 6|/^static bool is_wanted/,/^}/s/return ranges_overlapping(.*/return !engine.regions \&\& start > end;/
what_does_not_fit_is_lost|engine.c|engine_test|mappings_that_cannot_be_remembered_are_released|/^static void add_cover/,/^}/s/^\t\tforget(start, end);//
holes_are_overlooked|engine.c|engine_test|holes_are_refused_and_named|/^static int cover(/,/^}/s/if (error || mapping.start > start)/if (error || mapping.start > end)/
children_think_they_own_it|engine.c|engine_test|a_raw_child_is_told_that_it_is_a_copy|s/MADV_WIPEONFORK/MADV_NORMAL/
children_keep_the_parents|engine.c|engine_test|a_forked_child_has_no_watch_and_can_make_one|/^static void after_fork_in_child/,/^}/s/^\tengine.running = false;//
numbers_are_written_blindly|descriptor.h|engine_test|descriptors_closed_behind_its_back_hang_nobody|/^static inline bool is_owned/,/^}/s/return descriptor->fd >= 0 .*/return 1 ||/
children_keep_the_readers|forward.c|forward_test|a_forked_child_does_not_hide_the_end|/^static void after_fork_in_child/,/^}/s/^\t\tclose_forward(forward);/\t\t;/
what_was_read_and_not_sent_is_lost|forward.c|forward_test|flushing_without_room_loses_nothing|/^static int send_all/,/^}/s/^\t\tif (send(/\t\tssize_t size = forward->size;\n\t\tforward->size = 0;\n&/; /^static int send_all/,/^}/s/(size_t)forward->size/(size_t)size/
filters_are_ignored|engine.c|engine_test|what_was_not_asked_for_is_not_reported a_filter_hides_a_change_from_its_own_region_only|/^static bool asks_for/,/^}/s/return !causes.*/return true || region || kind;/
a_filter_stops_the_unknown|engine.c|engine_test|after_an_overrun_drops_may_be_under_way_anywhere|/^static bool asks_for/,/^}/s/return !causes\[kind\] ||/return/
moves_are_no_unmapping|engine.c|engine_test|who_asks_for_moves_is_told_of_unmapping_and_the_reverse|/^static uint32_t complete/,/^}/s/return wanted \& gone.*/return gone ? wanted : 0;/
no_filter_is_the_empty_one|engine.c|engine_test|what_asks_for_nothing_special_is_told_everything|/^static uint32_t complete/,/^}/s/return UMMUNOTIFY_REGION_CAUSE_MASK/return 0/
any_bits_are_a_filter|engine.c|engine_test|causes_that_nobody_can_ask_for_are_refused|s/^\tif (wanted & ~UMMUNOTIFY_REGION_CAUSE_MASK)/\tif (0)/
what_was_not_asked_for_spends_nothing|engine.c|engine_test|an_unmapping_that_nobody_asked_for_spends_the_region|/^static void hit/,/^}/s/^\tif (change->kind != CHANGE_DROPS_PAGES)/\tif (change->kind != CHANGE_DROPS_PAGES \&\& asked)/
a_silent_end_changes_no_state|engine.c|engine_test|an_unmapping_that_nobody_asked_for_spends_the_region|/^static void hit/,/^}/s/^\tregion->changes++;/\tregion->changes += asked;/
changes_are_not_counted|engine.c|engine_test|a_state_counts_what_is_done_to_its_region|/^static void hit/,/^}/s/^\tregion->changes++;//
changes_are_not_counted_too|engine.c|stress|--seconds 30 --patience 6|/^static void hit/,/^}/s/^\tregion->changes++;//
a_spent_region_is_calm|engine.c|engine_test|a_spent_region_is_busy_until_it_is_rearmed|/^static uint64_t state_of/,/^}/s/region->spent ||//
rearming_takes_changes_back|engine.c|engine_test|a_spent_region_is_busy_until_it_is_rearmed a_state_counts_what_is_done_to_its_region|/^int aioummu_rearm/,/^}/s/^\t\tregion->spent = false;/\t\tregion->spent = false, region->changes = 0;/
once_is_for_ever|engine.c|engine_test|a_region_for_once_ends_with_its_report what_was_not_read_is_still_registered|/^static size_t take_reports/,/^}/s/if (region->once)/if (0)/
once_is_for_ever_too|engine.c|forward_test|a_region_for_once_ends_when_its_report_is_sent|/^static size_t take_reports/,/^}/s/if (region->once)/if (0)/
once_is_over_before_its_report|engine.c|engine_test|what_was_not_read_is_still_registered|/^static void hit/,/^}/s/^\tif (!notifier->last_due)/\tif (region->once)\n\t\tranges_remove(\&notifier->cookies, \&region->cookie);\n&/
drops_are_not_remembered|engine.c|engine_test|a_region_registered_in_a_drop_is_busy_until_that_is_over rearming_in_a_drop_does_not_end_it|/^static void apply/,/^}/s/^\t\tremember_drop(change->start.*/\t\t;/
drops_are_not_remembered_too|engine.c|stress|--seconds 30 --patience 6|/^static void apply/,/^}/s/^\t\tremember_drop(change->start.*/\t\t;/
an_unmapping_ends_a_drop|engine.c|engine_test|what_is_mapped_anew_in_a_drop_is_busy|/^static void apply/,/^}/s/^\t\tdoubt_cover(/\t\tstruct drop *drop = find_drop(change->start, change->end);\n\t\tif (drop)\n\t\t\tremove_drop(drop);\n&/
a_drop_stays_behind|engine.c|engine_test|what_is_moved_in_a_drop_is_busy_where_it_is|/^static void apply/,/^}/s/^\t\tif (find_drop(change->start.*/\t\tif (0)/
an_overrun_forgets_drops|engine.c|engine_test|after_an_overrun_drops_may_be_under_way_anywhere|/^static void invalidate_everything/,/^}/s/^\tremember_drop(.*//
what_does_not_fit_replaces_a_drop|engine.c|engine_test|drops_beyond_the_limit_make_the_nearest_wider|/^static void remember_drop/,/^}/s/^\t\tabsorb(nearest_drop(start, end), &start, &end);/\t\tremove_drop(nearest_drop(start, end));/
drops_grow_anywhere|engine.c|engine_test|drops_beyond_the_limit_make_the_nearest_wider|/^static struct drop \*nearest_drop/,/^}/s/behind->range.start - end < start - before->end/1/
a_round_ends_what_came_after_it|engine.c|engine_test|drops_beyond_the_limit_make_the_nearest_wider|/^static void end_drops/,/^}/s/drop->number <= number/number/
a_drop_never_ends|engine.c|engine_test|a_drop_of_the_callers_own_is_over_at_once|/^static uint64_t look_for_ends/,/^}/s/^\t\tended = engine.round;/\t\tbreak;/
drops_end_unseen|threads.c|engine_test|a_region_registered_in_a_drop_is_busy_until_that_is_over a_drop_that_is_over_leaves_one_under_way_alone|/^bool threads_were_outside/,/^}/s/return !threads->count/return true/
drops_end_unseen_too|threads.c|stress|--seconds 60 --patience 6|/^bool threads_were_outside/,/^}/s/return !threads->count/return true/
whoever_sleeps_is_outside|threads.c|engine_test|a_region_registered_in_a_drop_is_busy_until_that_is_over rearming_in_a_drop_does_not_end_it|s/^\tSYS_madvise,//
parents_of_vfork_are_outside|threads.c|engine_test|a_child_of_vfork_is_thought_of|s/^\tSYS_vfork,//; s/^\tSYS_clone,//; s/^\tSYS_clone3,//
workers_are_outside|threads.c|engine_test|a_drop_by_io_uring_is_not_taken_to_be_over|/^static enum whereabouts sleeps_where/,/^}/s/^\tif (!pc)/\tif (0)/; s/^\tSYS_io_uring_enter,//
only_sleepers_are_outside|threads.c|engine_test|a_thread_that_never_sleeps_does_not_keep_it_busy|/^static uint64_t user_time/,/^}/s/if (threads->same_numbers \&\&/if (0 \&\&/
time_in_the_kernel_counts|threads.c|engine_test|a_drop_that_never_sleeps_is_not_over|/^static uint64_t user_time/,/^}/s/<< 3 | 4 | 1/<< 3 | 4 | 2/
any_descriptor_will_do|threads.c|engine_test|who_cannot_be_looked_at_is_not_taken_to_be_outside|s/if (!is_owned(&threads->directory) || !list_once(threads))/list_once(threads); if (!threads->count) return true; if (0)/; s/threads->count \&\& is_owned(&threads->directory)/threads->count/
the_last_before_is_the_first|ranges.c|ranges_test|the_tree_does_what_an_array_does|/^struct range \*ranges_before/,/^}/s/found = root/found = found ? found : root/
the_greatest_end_is_forgotten|ranges.c|ranges_test|the_tree_does_what_an_array_does|/^void ranges_remove/,/^}/s/^\tupdate(node);//
the_whole_tree_is_walked|ranges.c|ranges_test|a_million_ranges_stay_shallow|/^void ranges_visit/,/^}/s/while (root \&\& root->last_end > start)/while (root)/
equal_starts_are_one|ranges.c|ranges_test|ranges_with_the_same_start_are_all_found|/^static bool is_before/,/^}/s/return (uintptr_t)a < (uintptr_t)b/return false/
the_last_byte_is_outside|mappings.c|mappings_test|every_mapping_of_this_process_is_found|/^static int scan/,/^}/s/mapping->end > address/mapping->end > address + 1/
a_piece_is_everything|mappings.c|mappings_test|thousands_of_mappings_are_all_found a_line_longer_than_a_page_is_read|/^static char next/,/^}/s/^\tif (text->at == text->length) {/\tif (text->at == text->length \&\& text->length)\n\t\treturn 0;\n&/
END
}

wanted() {
	name=$1
	shift
	[ $# -eq 0 ] && return 0
	for other; do
		[ "$other" = "$name" ] && return 0
	done
	return 1
}

# Writes a copy of the engine to $1, with sed script $3 applied to $2.
copy_engine() {
	rm -rf "$1"
	mkdir -p "$1" || exit 1
	cp ../*.c ../*.h "$1" || exit 1
	sed "$3" "../$2" >"$1/$2" || exit 1
	if cmp -s "../$2" "$1/$2"; then
		echo "mutant $name: its sed script matches nothing" >&2
		exit 1
	fi
}

# Whether the tests in $3 of program $2, built in $1, notice.
is_noticed() {
	if [ "$2" = stress ]; then
		# shellcheck disable=SC2086 # these are options
		! timeout -s KILL 120 "$1/$2" $3 >"$1/log" 2>&1
		return
	fi
	for test in $3; do
		TEST_LIMIT=6 timeout -s KILL 60 "$1/$2" "$test" >>"$1/log" 2>&1
		grep -q "^not ok 1 $test" "$1/log" || return 1
	done
}

run_mutants() {
	directory=$1
	shift
	count=0 noticed=0
	list=$(mktemp) || exit 1
	mutants >"$list"
	while IFS='|' read -r name file program arguments script; do
		wanted "$name" "$@" || continue
		count=$((count + 1))
		build=$directory/mutants/$name
		copy_engine "$build/engine" "$file" "$script"
		# What a mutant leaves unused is meant to be.
		if ! ${MAKE:-make} -j2 "$build/$program" ENGINE="$build/engine" \
			BUILD="$build" CFLAGS="-O2 -g -w" >"$build/make.log" 2>&1; then
			cat "$build/make.log" >&2
			echo "mutant $name does not build" >&2
			exit 1
		fi
		if is_noticed "$build" "$program" "$arguments"; then
			noticed=$((noticed + 1))
			echo "ok $count $name"
		else
			sed 's/^/# /' "$build/log"
			echo "not ok $count $name"
		fi
	done <"$list"
	rm -f "$list"
	echo "$noticed of $count noticed"
	[ "$noticed" -eq "$count" ] && [ "$count" -gt 0 ]
}

case $1 in
list) mutants | cut -d'|' -f1,3,4 ;;
'') sed -n '4,10s/^# \{0,1\}//p' "$0"; exit 1 ;;
*) run_mutants "$@" ;;
esac
