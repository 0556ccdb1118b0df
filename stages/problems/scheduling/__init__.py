"""The scheduling problem: choose and order events for the largest weighted duration."""
