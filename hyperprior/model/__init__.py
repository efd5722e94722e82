"""The scale hyperprior as mathematics.

Read in this order:

    hyperprior   the model: transforms and densities, with the noise of training or the rounding of the codec
    transforms   g_a, g_s, h_a, h_s layer by layer
    layers       convolution and GDN
    bounds       bounds whose gradient only leads back; parameters that stay non-negative
    kernels      the computations of the layers, fast on a CPU
    priors       the bits that latents cost, and the noise that replaces rounding in training
    metrics      bits per pixel, MSE, PSNR, MS-SSIM, the Lagrangian
    initial      the first weights: a wavelet packet, or the weights of a run at another lambda
    work         the number of operations of each layer

This package knows neither data nor files.
"""
