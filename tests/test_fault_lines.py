"""Which tests look for which fault: a line of the list of faults, and what fails where it comes back."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

FAULT_LINES = {
    "A1": {
        "extract/test_decoding_truth.py": [
            "test_a_file_that_was_cut_is_truncated",
            "test_two_frames_or_two_percent_may_be_missing",
            "test_damage_in_the_middle_and_at_the_end_are_judged_alike",
            "test_what_only_looks_short_stays_good_with_the_same_frames",
            "test_scan_says_what_extract_says_word_for_word",
        ],
        "extract/test_damaged_corpus.py": [],
    },
    "A2": {
        "extract/test_sources.py": ["test_a_replaced_video_is_told_and_its_row_keeps_every_byte"],
        "extract/test_decoding_truth.py": ["test_a_source_that_changes_meanwhile_is_a_failed_row"],
    },
    "A3": {
        "extract/test_decoding_truth.py": [
            "test_pictures_lie_as_the_display_matrix_says",
            "test_frames_of_a_folder_lie_as_their_exif_says",
        ]
    },
    "A4": {"extract/test_decoding_truth.py": ["test_the_film_is_the_track_that_players_choose"]},
    "A5": {
        "extract/test_decoding_truth.py": [
            "test_a_still_stretch_shows_its_last_frame",
            "test_every_segment_of_a_video_with_a_still_stretch_is_a_row",
        ]
    },
    "A6": {
        "extract/test_decoding_truth.py": [
            "test_joined_streams_are_counted_on",
            "test_what_cannot_be_counted_on_is_told",
        ]
    },
    "A7": {
        "extract/test_decoding_truth.py": [
            "test_a_file_that_names_others_opens_none",
            "test_decord_alone_would_open_a_playlist_under_any_name",
            "test_data_in_another_file_are_not_read",
        ]
    },
    "A8": {"extract/test_decoding_truth.py": ["test_what_is_no_video_is_named_by_its_first_bytes"]},
    "A9": {
        "extract/test_listing_truth.py": [
            "test_spellings_of_a_split_in_a_table_are_one_split",
            "test_spellings_of_a_split_are_folded_in_folders_json_and_lists_too",
        ]
    },
    "A10": {
        "extract/test_listing_truth.py": [
            "test_videos_of_rarer_kinds_are_listed",
            "test_folders_of_numbered_pictures_are_videos_whatever_their_format",
            "test_files_that_are_not_taken_are_counted_in_one_line",
        ]
    },
    "A11": {
        "test_messages.py": [
            "test_a_query_that_is_too_long_says_what_is_left_out",
            "test_an_extraction_says_once_how_many_captions_are_cut",
        ]
    },
    "A12": {
        "extract/test_listing_truth.py": [
            "test_addresses_are_refused_with_the_remedy",
            "test_backslashes_part_folders_unless_they_are_in_a_name",
            "test_accents_are_one_however_they_are_spelled",
            "test_lines_that_a_list_cannot_mean_are_refused",
        ]
    },
    "A13": {
        "extract/test_annotation_names.py": [
            "test_names_that_lead_out_of_the_root_are_malformed_rows",
            "test_nothing_outside_the_root_is_looked_for",
            "test_no_reader_returns_a_path_that_leads_out_of_the_root",
        ]
    },
    "B1": {
        "extract/test_sources.py": [
            "test_neighbours_of_a_retried_row_are_not_taken_from_other_videos",
            "test_changed_rows_are_done_anew_when_asked_for",
            "test_a_row_is_pending_while_its_arrays_are_replaced",
            "test_segments_of_a_file_that_was_replaced_halfway_do_not_agree",
            "test_the_commands_line_says_it_and_strict_exits_with_3",
        ],
        "extract/test_source.py": ["test_time_alone_is_not_trusted_and_size_alone_is"],
    },
    "B2": {
        "extract/test_sources.py": [
            "test_a_file_that_vanishes_leaves_its_row_pending",
            "test_a_brake_stops_a_run_that_loses_everything",
        ]
    },
    "B3": {
        "extract/test_decoder_limits.py": [
            "test_a_killed_decoder_loses_no_video",
            "test_a_kill_during_the_start_is_no_reason_to_stop",
            "test_errors_of_the_machine_are_no_fault_of_the_video",
        ]
    },
    "B4": {
        "extract/test_decoder_limits.py": [
            "test_a_decoders_memory_does_not_grow_with_frames_times_pixels",
            "test_an_announcement_costs_no_memory",
            "test_an_honest_8k_film_passes",
        ]
    },
    "B5": {
        "extract/test_decoder_limits.py": ["test_a_circle_of_links_is_a_row_with_a_reason"],
        "extract/test_listing_truth.py": ["test_odd_files_are_rows_with_a_reason_or_counted"],
    },
    "B6": {
        "extract/test_listing_truth.py": [
            "test_an_archive_of_mixed_depth_is_read_without_classes_and_says_so",
            "test_no_classes_takes_paths_as_ids_and_nothing_else",
        ]
    },
    "B7": {
        "store/test_merge.py": [
            "test_a_flipped_byte_is_not_passed_on",
            "test_the_copy_with_more_good_rows_wins_whatever_the_order",
            "test_what_is_no_plain_file_is_refused_and_not_copied",
        ]
    },
    "B8": {"extract/test_sources.py": ["test_readers_never_see_damage_while_rows_are_retried"]},
    "B9": {
        "extract/test_dask_cluster.py": [
            "test_a_shard_that_kills_its_workers_is_set_aside_and_the_rest_goes_on",
        ]
    },
    "C1": {
        "store/test_scratch.py": [
            "test_extracting_leaves_neighbours_alone",
            "test_merging_leaves_neighbours_alone",
            "test_indexing_leaves_neighbours_alone",
            "test_only_what_bears_its_own_tag_is_removed",
        ]
    },
    "C2": {
        "store/test_hostile_store.py": [
            "test_a_hostile_append_is_refused_with_nothing_changed",
            "test_no_link_is_followed_and_no_pipe_is_waited_for",
        ]
    },
    "C3": {
        "store/test_hostile_store.py": [
            "test_an_index_may_not_point_outside_of_its_file_or_over_another_chunk",
            "test_an_array_must_be_the_one_of_the_layout",
            "test_hostile_sizes_take_no_memory",
        ]
    },
    "C4": {
        "store/test_lease.py": [
            "test_of_two_that_race_exactly_one_has_the_lease",
            "test_another_machine_that_fell_silent_is_dead_after_three_beats",
            "test_an_owner_stopped_past_its_expiry_knows_when_it_goes_on",
        ],
        "extract/test_two_machines.py": [
            "test_what_a_second_machine_does_meanwhile_is_refused_or_side_by_side",
            "test_two_parts_begun_at_once_make_one_store",
        ],
        "store/test_scratch.py": ["test_two_writers_of_one_file_never_share_a_temporary_one"],
    },
    "C5": {"extract/test_cluster_privacy.py": ["test_a_stranger_cannot_run_code_on_a_cluster_of_our_own"]},
    "C6": {"test_texts_are_texts.py": []},
    "D": {
        "retrieve/test_index_scale.py": ["test_row_tables_are_taken_once_and_sliced_for_each_shard"],
        "extract/test_dask_cluster.py": ["test_a_worker_walks_no_root_and_reads_no_table_of_all_rows"],
        "store/test_markers.py": [
            "test_a_consolidation_reads_the_markers_that_changed_and_no_others",
            "test_retried_shards_do_not_rewrite_the_list_of_hashes",
        ],
    },
    "F1": {
        "test_progress.py": [
            "test_an_extraction_tells_each_stage_in_a_line",
            "test_a_trial_of_one_frame_takes_few_frames_through_the_backbone",
            "test_the_sample_of_a_real_run_is_what_it_was",
        ]
    },
    "F3": {"extract/test_listing_truth.py": ["test_tables_of_excel_are_read"]},
    "F4": {
        "extract/test_decoding_truth.py": ["test_frames_that_come_out_of_order_are_taken_by_their_times"],
        "extract/test_decoder_limits.py": ["test_an_exception_of_python_is_never_a_reason"],
    },
    "F5": {"extract/test_decoding_truth.py": ["test_a_title_that_is_not_utf8_does_not_matter"]},
    "F6": {"test_messages.py": ["test_the_newest_store_is_one_with_a_good_video"]},
    "F7": {
        "extract/test_listing_truth.py": [
            "test_every_class_with_two_videos_has_one_held_out",
            "test_an_archive_without_labels_has_one_split",
            "test_a_store_keeps_its_splits_and_new_rows_fill_up_the_share",
        ]
    },
    "F8": {"extract/test_listing_truth.py": ["test_videos_that_moved_are_told_as_moved"]},
    "F9": {
        "test_messages.py": [
            "test_info_and_verify_and_merge_name_rows_and_files",
            "test_search_index_and_verify_say_that_rows_are_pending",
        ]
    },
}
"""By the fault's line: file -> its tests; an empty list is the whole file. F2 is the time that `make test` takes."""


@pytest.mark.parametrize("line", FAULT_LINES)
def test_every_fault_has_tests_that_are_there(line):
    for name, tests in FAULT_LINES[line].items():
        tree = ast.parse((TESTS / name).read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
        assert there and set(tests) <= there, f"{name} lacks {sorted(set(tests) - there)}"
