// performance
