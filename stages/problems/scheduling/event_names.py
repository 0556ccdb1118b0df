"""What events are called in the text form of the scheduling problem: five kinds of day, ten events each."""

from __future__ import annotations

NAMES: dict[str, tuple[str, ...]] = {
    "Film Festival": (
        "Opening night gala", "Silent film with live piano", "Q&A with director Mara Lindqvist", "Short film marathon", "Red carpet photos",
        "Documentary on glaciers", "Popcorn break with Tom", "Restored western screening", "Jury discussion", "Stop-motion workshop",
    ),
    "Hospital": (
        "Morning ward round", "Handover with the night shift", "X-ray review", "Lunch with Dr. Okafor", "Vaccination clinic",
        "Hand hygiene training", "Call with the pharmacy", "Surgery planning meeting", "Writing discharge letters", "Visit to the children's ward",
    ),
    "Bakery": (
        "Feeding the sourdough", "Baking rye bread", "Flour delivery", "Decorating a wedding cake", "Tasting new croissants",
        "Cleaning the ovens", "Ordering butter and eggs", "Interview with an apprentice", "Packing online orders", "Weekly accounts",
    ),
    "Weekend": (
        "Bike ride along the river", "Repairing the garden fence", "Video call with Grandma", "Piano practice", "Flea market visit",
        "Board games with Nina and Oskar", "Baking an apple pie", "Swimming lesson", "Reading 'Middlemarch'", "Stargazing on the hill",
    ),
    "Robotics Lab": (
        "Calibrating the gripper", "Stand-up with the vision team", "Soldering motor drivers", "Review of the safety case", "Reading group on planning",
        "Demo for visitors", "Battery endurance test", "Pair programming with Ines", "Writing the grant proposal", "3D-printing spare parts",
    ),
}  # fmt: skip
"""Kind of day -> names."""
