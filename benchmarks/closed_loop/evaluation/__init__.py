"""Success of policies, compared episode by episode."""
