"""What machines produce: routing traces, expert loads, placements, plans and hardware profiles, frozen and checked."""
