"""Pictures, figures, the token theatre and the report page: data in, drawings out."""
