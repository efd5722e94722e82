"""The scale hyperprior as mathematics.

Read in this order:

    architecture   the layers of the four transforms, and the shapes of all weights
    hyperprior     the model: transforms and densities, with the noise of training or the rounding of the codec
    transforms     g_a, g_s, h_a, h_s with TensorFlow
    layers         convolution and GDN
    bounds         bounds whose gradient only leads back; parameters that stay non-negative
    kernels        the computations of the layers, fast on a CPU
    priors         the bits that latents cost, and the noise that replaces rounding in training
    densities      the same densities in NumPy, for tables and estimates
    metrics        bits per pixel, MSE, PSNR, MS-SSIM of a batch in training
    quality        PSNR and MS-SSIM of two pictures, and the Lagrangian, in NumPy
    initial        the first weights: a wavelet packet, or the weights of a run at another lambda
    work           the number of operations of each layer

architecture, densities and quality do not need TensorFlow. This package knows neither data nor files.
"""
