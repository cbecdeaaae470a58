"""From files and questions to model inputs: images, chats, models, processors."""
